"""Searches a method's hyperparameters with Optuna, for the best mean score over the public forget sets.

    python -m evaluator.tuning methods/fanchuan.py          one method; every method gets the same budget; resumable
    python -m evaluator.tuning                              every method
    python -m evaluator.tuning --split public               one forget set instead of all that match public*

What may be tried stands beside each field of a method's Config, as an annotation:
`Annotated[float, (low, high)]`, `(low, high, "log")` for either number type, or a list of choices. Epochs are written for a
retraining of 12, the digits', and grow and shrink with that of other data.
The values found are written to methods/tuned/<data>.json, which `evaluate.py --tuned` uses.
"""

import dataclasses
import hashlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from evaluator import command
from evaluator.evaluation import HERE, Evaluation
from evaluator.files import Problem, read_json, write_json
from evaluator.method import Diverged, Method
from evaluator.models import network_digest
from evaluator.progress import progress
from evaluator.runs import unlearned_pools
from evaluator.scoring import COST_LIMIT, VERSION, score

TRIALS, RUNS = 20, 16  # the budget of a method: settings scored, runs of each on every forget set,
FINALISTS, TIMES_RUNS = 4, 4  # how many of the best are scored again, with how many times the runs
DRAWN_AT_RANDOM = 8  # trials, before the sampler starts to learn from them
COMPETITION_STEPS = 550  # about so many batches of 64 has an epoch of the competition's retain set
EPOCHS = 12  # of a retraining for which the methods' ranges of epochs are written, the digits'


def tuned_values(path: Path | str, data_name: str) -> dict:
    """The Config values found for a method file; none for a method without ranges, which is used as it is.

    Raises Problem where the method has ranges and was not tuned.
    """
    kept = read_json(tuned_file(data_name)).get(Path(path).stem)
    if isinstance(kept, dict) and isinstance(kept.get("config"), dict):
        return kept["config"]
    if Path(path).is_file() and not Method.read(path).search_space:
        return {}
    raise Problem(f"{path}: has not been tuned on {data_name}: make tune METHOD={path}")


def tuned_file(data_name: str) -> Path:
    return HERE / "methods" / "tuned" / f"{data_name}.json"


def rate_factor(evaluation: Evaluation) -> float:
    """What published learning rates are multiplied by here, so that rates times steps per epoch are the competition's."""
    return COMPETITION_STEPS / math.ceil(len(evaluation.data.retain) / evaluation.recipe.batch_size)


def with_rates(values: dict, factor: float) -> dict:
    """Config values with every learning rate multiplied."""
    rates = {
        field: tuple(factor * rate for rate in value) if isinstance(value, tuple) else factor * value
        for field, value in values.items()
        if {"rate", "rates"} & set(field.split("_"))
    }
    return values | rates


def suggest(trial, method: Method) -> dict:
    """Values of a trial for the fields of the search space. A range of a field that is a tuple is for its only entry."""
    values = {}
    for name, allowed in method.search_space.items():
        present = method.config[name]
        if isinstance(allowed, list):
            values[name] = allowed[trial.suggest_categorical(name, range(len(allowed)))]
            continue
        low, high, *log = allowed
        whole = _whole(present, low)
        draw = trial.suggest_int if whole else trial.suggest_float
        value = draw(name, low, high, log=bool(log))
        value = value if whole else float(f"{value:.3g}")  # digits that a person can read
        values[name] = (value,) if isinstance(present, tuple) else value
    return values


def _whole(present: object, low: object) -> bool:
    """Whether a field takes whole numbers only: a float's value may be written as one, its range's ends are not."""
    return isinstance(present, int) and not isinstance(present, bool) and isinstance(low, int)


def fitted(method: Method, epochs: int) -> Method:
    """The method with its ranges of epochs for a retraining of `epochs`, so that 20% of its cost buys the same part."""
    times = epochs / EPOCHS
    if times == 1:
        return method

    def scaled(value: object, whole: bool) -> object:
        if isinstance(value, list | tuple):
            return type(value)(scaled(part, whole) for part in value)
        if isinstance(value, str):  # "log"
            return value
        return max(1, round(value * times)) if whole else float(f"{value * times:.3g}")

    space = {
        name: scaled(allowed, _whole(method.config[name], allowed[0])) if "epochs" in name else allowed
        for name, allowed in method.search_space.items()
    }
    return dataclasses.replace(method, search_space=space)


def tune(evaluations: Sequence[Evaluation], method: Method, trials: int = TRIALS) -> dict:
    """Search until `trials` settings within the cost limit are scored: the mean over some forget sets of one data set, each
    with as many runs as its evaluation has. The best few are scored again with more runs, and the best of those is taken.

    A setting over the limit of 20% of a retraining (measured on the first forget set), or with which a network diverges on
    any of them, is rejected without a score; there may be twice as many of those. The first settings have the Config's
    defaults, as they are and with rates by `rate_factor`, so that no method starts from values found earlier. Trials are
    kept under results/<data>/<first split>/tuning, and an interrupted search resumes there. Returns what `write` puts into
    methods/tuned/<data>.json.
    """
    method = fitted(method, evaluations[0].recipe.epochs)
    with evaluations[0].alone():
        study = _study(evaluations, method)
        search(study, evaluations, method, trials)
        return finals(study, evaluations, method)


def search(study, evaluations: Sequence[Evaluation], method: Method, trials: int) -> None:
    """Score settings until there are `trials` of them."""
    import optuna

    with progress(f"tuning {method.name}", trials, "trial") as bar:
        bar.update(len(_scored(study)))
        while len(_scored(study)) < trials and len(_finished(study)) < 3 * trials:
            # Seeded by the number of finished trials: an interrupted search continues as it would have.
            study.sampler = optuna.samplers.TPESampler(seed=len(_finished(study)), n_startup_trials=DRAWN_AT_RANDOM)
            trial = study.ask()
            tried = dataclasses.replace(method, config=method.config | suggest(trial, method))
            try:
                cost, _ = evaluations[0].cost(tried, repeats=1, at_most=0.5)
                if cost > COST_LIMIT:
                    study.tell(trial, COST_LIMIT - cost)  # below every score, so the search turns away
                    continue
                value = statistics.fmean(scores(evaluations, tried).values())
            except Diverged:
                study.tell(trial, -1.0)
                continue
            trial.set_user_attr("config", tried.config)
            trial.set_user_attr("fraction_of_retraining", cost)
            study.tell(trial, value)
            bar.update()
    if not _scored(study):
        raise Problem(f"{method.path}: every setting tried costs more than {COST_LIMIT:.0%} of a retraining or diverges")


def finals(study, evaluations: Sequence[Evaluation], method: Method) -> dict:
    """The best of the best few, scored again: few runs give noisy scores, and the best of many noisy ones is mostly luck.

    Raises Problem when all of them diverge.
    """
    runs, forget_sets = evaluations[0].runs, len(evaluations)
    longer = [dataclasses.replace(evaluation, runs=TIMES_RUNS * runs) for evaluation in evaluations]

    def final_scores(trial) -> dict[str, float]:
        name = f"scores of trial {trial.number} at N = {longer[0].runs}"
        if name not in study.user_attrs:
            try:
                found = scores(longer, dataclasses.replace(method, config=_config(trial, method)))
            except Diverged:
                found = {}
            study.set_user_attr(name, found)
        return study.user_attrs[name]

    finalists = sorted(_scored(study), key=lambda trial: -trial.value)[:FINALISTS]
    means = {trial.number: statistics.fmean(found.values()) for trial in finalists if (found := final_scores(trial))}
    if not means:
        raise Problem(f"{method.path}: each of the best {len(finalists)} settings diverges at N = {longer[0].runs}")
    best = next(trial for trial in finalists if trial.number == max(means, key=means.get))
    where = f" on {forget_sets} forget sets" if forget_sets > 1 else ""
    return {
        "config": best.user_attrs["config"],
        "score": means[best.number],
        "scores": final_scores(best),
        "forget_sets": forget_sets,
        "fraction_of_retraining": best.user_attrs["fraction_of_retraining"],
        "runs": longer[0].runs,
        "trials": f"{len(_scored(study))} at N = {runs}{where}, {len(finalists)} of them at N = {longer[0].runs}",
        "rejected": len(_finished(study)) - len(_scored(study)),
    }


def write(found: dict, method: Method, data_name: str) -> None:
    """Add the values found for a method to the file of all methods."""
    file = tuned_file(data_name)
    write_json(file, dict(sorted((read_json(file) | {method.name: found}).items())))


def _study(evaluations: Sequence[Evaluation], method: Method):
    """The kept search of a method, or a new one that begins with the published setting, as it is and with other rates."""
    try:
        import optuna
    except ImportError as error:
        raise Problem("tuning needs Optuna: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Whatever could change a trial's score is in the study's name.
    made_of = {
        **method.made_from,
        "original": network_digest(evaluations[0].original()),
        "retrained": {evaluation.data.split: evaluation.retrained().folder.name for evaluation in evaluations},
        "scoring": VERSION,
        "runs": evaluations[0].runs,
    }
    name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    journal = evaluations[0].results / "tuning" / f"{method.name}.journal"
    journal.parent.mkdir(parents=True, exist_ok=True)
    try:
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
        study = optuna.create_study(
            study_name=f"{method.name} {name}", storage=storage, direction="maximize", load_if_exists=True
        )
    except (ValueError, KeyError, TypeError) as error:
        raise Problem(f"{journal}: damaged ({type(error).__name__}); delete it to start the search again") from error
    if not study.trials:
        for values in (method.defaults, with_rates(method.defaults, rate_factor(evaluations[0]))):
            study.enqueue_trial(_setting(method, values), skip_if_exists=True)
    return study


def _finished(study) -> list:
    return [trial for trial in study.trials if trial.state.name == "COMPLETE"]


def _scored(study) -> list:
    return [trial for trial in _finished(study) if "config" in trial.user_attrs]


def _config(trial, method: Method) -> dict:
    """A trial's values; the journal's JSON has lists for tuples."""
    kept = trial.user_attrs["config"]
    return {name: tuple(value) if isinstance(method.config[name], tuple) else value for name, value in kept.items()}


def _setting(method: Method, values: dict) -> dict:
    """Config values as a point of the search space; numbers outside a range are moved to its ends."""
    setting = {}
    for name, allowed in method.search_space.items():
        value = values[name]
        if isinstance(allowed, list):
            if value in allowed:
                setting[name] = allowed.index(value)
            continue
        value = value[0] if isinstance(value, tuple) else value
        setting[name] = min(max(value, allowed[0]), allowed[1])
    return setting


def scores(evaluations: Sequence[Evaluation], method: Method) -> dict[str, float]:
    """A method's score on each forget set, by split. The runs are not kept.

    Raises Diverged when a network diverges on any of them, and Problem naming the split.
    """
    one, found = evaluations[0], {}
    for start in range(0, len(evaluations), one.setting.jobs):  # a process holds the images of all of them
        some = evaluations[start : start + one.setting.jobs]
        retrained = [evaluation.retrained().load(range(one.runs)) for evaluation in some]
        with tempfile.TemporaryDirectory() as folder:
            setting, sets = dataclasses.replace(one.setting, results=Path(folder)), [evaluation.data for evaluation in some]
            pools = unlearned_pools(setting, sets, one.recipe, one.original(), method, one.runs, named=True)
            unlearned = [pool.load(range(one.runs)) for pool in pools]
        for *both, data in zip(unlearned, retrained, sets, strict=True):
            found[data.split] = score(*both, data)[0]["score"]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser(__doc__, "split", runs=RUNS, split="public*")
    parser.add_argument("methods", nargs="*", type=Path, metavar="METHOD", help="method files (default: every one)")
    parser.add_argument("--trials", type=int, default=TRIALS, help="settings to score per method (default: %(default)s)")
    args = parser.parse_args(arguments)
    return command.run(lambda: tune_all(args))


def tune_all(args) -> None:
    evaluations = list(command.evaluations(args))
    data_name = evaluations[0].data.name
    if args.trials < 1:
        raise Problem(f"--trials {args.trials}: at least 1 setting must be scored")
    for path in args.methods or [HERE / "unlearning.py", *sorted((HERE / "methods").glob("*.py"))]:
        method = Method.read(path, data_name)
        if not method.search_space:
            print(f"{path}: no field of its Config has a range to search: it is used as it is", flush=True)
            continue
        start = time.perf_counter()
        found = tune(evaluations, method, args.trials)
        minutes = (time.perf_counter() - start) / 60
        write(found, method, data_name)
        said = f"score {found['score']:.4f} ({found['trials']}), {found['config']} ({minutes:.1f} min)"
        print(f"{evaluations[0].data.title}, {method.name}: {said}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
