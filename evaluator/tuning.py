"""Searches a method's hyperparameters with Optuna, for the best competition score on the public split.

    python -m evaluator.tuning methods/fanchuan.py          one method; every method gets the same budget; resumable
    python -m evaluator.tuning                              every method

What may be tried stands beside each field of a method's Config, as an annotation:
`Annotated[float, (low, high)]`, `(low, high, "log")` for either number type, or a list of choices.
The values found are written to methods/tuned/<data>.json, which `evaluate.py --tuned` uses.
"""

import dataclasses
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path

from evaluator import command
from evaluator.evaluation import HERE, Evaluation
from evaluator.files import Problem, read_json, write_json
from evaluator.method import Diverged, Method
from evaluator.models import network_digest
from evaluator.progress import progress
from evaluator.runs import unlearned_pool
from evaluator.scoring import COST_LIMIT, VERSION, score

TRIALS, RUNS = 20, 64  # the budget of a method: settings scored, runs of each,
FINALISTS, TIMES_RUNS = 4, 4  # how many of the best are scored again, with how many times the runs
DRAWN_AT_RANDOM = 8  # trials, before the sampler starts to learn from them


def tuned_values(path: Path | str, data_name: str) -> dict:
    """The Config values found for a method file. Raises Problem where there are none."""
    kept = read_json(tuned_file(data_name)).get(Path(path).stem)
    if not isinstance(kept, dict) or not isinstance(kept.get("config"), dict):
        raise Problem(f"{path}: has not been tuned on {data_name}: make tune METHOD={path}")
    return kept["config"]


def tuned_file(data_name: str) -> Path:
    return HERE / "methods" / "tuned" / f"{data_name}.json"


def suggest(trial, method: Method) -> dict:
    """Values of a trial for the fields of the search space. A range of a field that is a tuple is for its only entry."""
    values = {}
    for name, allowed in method.search_space.items():
        present = method.config[name]
        if isinstance(allowed, list):
            values[name] = allowed[trial.suggest_categorical(name, range(len(allowed)))]
            continue
        low, high, *log = allowed
        whole = isinstance(present, int) and not isinstance(present, bool)
        whole = whole and isinstance(low, int)
        draw = trial.suggest_int if whole else trial.suggest_float
        value = draw(name, low, high, log=bool(log))
        value = value if whole else float(f"{value:.3g}")  # digits that a person can read
        values[name] = (value,) if isinstance(present, tuple) else value
    return values


def tune(evaluation: Evaluation, method: Method, trials: int = TRIALS) -> dict:
    """Search until `trials` settings within the cost limit are scored, each with as many runs as the evaluation has; the
    best few are scored again with more runs, and the best of those is taken.

    A setting over the limit of 20% of a retraining, or with which a network diverges, is rejected without a score; there
    may be twice as many of those. The first setting has the Config's defaults, so that no method starts from values found
    earlier. Trials are kept under results/<data>/<split>/tuning, and an interrupted search resumes there. Returns what
    `write` puts into methods/tuned/<data>.json.
    """
    with evaluation.alone():
        study = _study(evaluation, method)
        search(study, evaluation, method, trials)
        return finals(study, evaluation, method)


def search(study, evaluation: Evaluation, method: Method, trials: int) -> None:
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
                cost = evaluation.cost(tried, repeats=1, at_most=0.5)
                if cost > COST_LIMIT:
                    study.tell(trial, COST_LIMIT - cost)  # below every score, so the search turns away
                    continue
                value = _score(evaluation, tried)
            except Diverged:
                study.tell(trial, -1.0)
                continue
            trial.set_user_attr("config", tried.config)
            trial.set_user_attr("fraction_of_retraining", cost)
            study.tell(trial, value)
            bar.update()
    if not _scored(study):
        raise Problem(f"{method.path}: every setting tried costs more than {COST_LIMIT:.0%} of a retraining or diverges")


def finals(study, evaluation: Evaluation, method: Method) -> dict:
    """The best of the best few, scored again: few runs give noisy scores, and the best of many noisy ones is mostly luck."""
    longer = dataclasses.replace(evaluation, runs=TIMES_RUNS * evaluation.runs)

    def final_score(trial) -> float:
        name = f"score of trial {trial.number} at N = {longer.runs}"
        if name not in study.user_attrs:
            try:
                value = _score(longer, dataclasses.replace(method, config=_config(trial, method)))
            except Diverged:
                value = -1.0
            study.set_user_attr(name, value)
        return study.user_attrs[name]

    finalists = sorted(_scored(study), key=lambda trial: -trial.value)[:FINALISTS]
    best = max(finalists, key=final_score)
    return {
        "config": best.user_attrs["config"],
        "score": final_score(best),
        "fraction_of_retraining": best.user_attrs["fraction_of_retraining"],
        "runs": longer.runs,
        "trials": f"{len(_scored(study))} at N = {evaluation.runs}, {len(finalists)} of them at N = {longer.runs}",
        "rejected": len(_finished(study)) - len(_scored(study)),
    }


def write(found: dict, method: Method, data_name: str) -> None:
    """Add the values found for a method to the file of all methods."""
    file = tuned_file(data_name)
    write_json(file, dict(sorted((read_json(file) | {method.name: found}).items())))


def _study(evaluation: Evaluation, method: Method):
    """The kept search of a method, or a new one that begins with the published setting."""
    try:
        import optuna
    except ImportError as error:
        raise Problem("tuning needs Optuna: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Whatever could change a trial's score is in the study's name.
    made_of = {
        **method.made_from,
        "original": network_digest(evaluation.original()),
        "retrained": evaluation.retrained().folder.name,
        "scoring": VERSION,
        "runs": evaluation.runs,
    }
    name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    journal = evaluation.results / "tuning" / f"{method.name}.journal"
    journal.parent.mkdir(parents=True, exist_ok=True)
    try:
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
        study = optuna.create_study(
            study_name=f"{method.name} {name}", storage=storage, direction="maximize", load_if_exists=True
        )
    except (ValueError, KeyError, TypeError) as error:
        raise Problem(f"{journal}: damaged ({type(error).__name__}); delete it to start the search again") from error
    if not study.trials:
        study.enqueue_trial(_published_setting(method))
    return study


def _finished(study) -> list:
    return [trial for trial in study.trials if trial.state.name == "COMPLETE"]


def _scored(study) -> list:
    return [trial for trial in _finished(study) if "config" in trial.user_attrs]


def _config(trial, method: Method) -> dict:
    """A trial's values; the journal's JSON has lists for tuples."""
    kept = trial.user_attrs["config"]
    return {name: tuple(value) if isinstance(method.config[name], tuple) else value for name, value in kept.items()}


def _published_setting(method: Method) -> dict:
    """The Config's defaults as a point of the search space; numbers outside a range are moved to its ends."""
    setting = {}
    for name, allowed in method.search_space.items():
        value = method.defaults[name]
        if isinstance(allowed, list):
            if value in allowed:
                setting[name] = allowed.index(value)
            continue
        value = value[0] if isinstance(value, tuple) else value
        setting[name] = min(max(value, allowed[0]), allowed[1])
    return setting


def _score(evaluation: Evaluation, method: Method) -> float:
    retrained = evaluation.retrained().load(range(evaluation.runs))
    with tempfile.TemporaryDirectory() as folder:  # a trial's runs are not kept, its score is
        setting = dataclasses.replace(evaluation.setting, results=Path(folder))
        made = (setting, evaluation.data, evaluation.recipe, evaluation.original(), method, evaluation.runs)
        return score(unlearned_pool(*made).load(range(evaluation.runs)), retrained, evaluation.data)[0]["score"]


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser(__doc__, runs=RUNS)
    parser.add_argument("methods", nargs="*", type=Path, metavar="METHOD", help="method files (default: every one)")
    parser.add_argument("--trials", type=int, default=TRIALS, help="settings to score per method (default: %(default)s)")
    args = parser.parse_args(arguments)
    return command.run(lambda: tune_all(args))


def tune_all(args) -> None:
    evaluation = command.evaluation(args, split="public")
    if args.trials < 1:
        raise Problem(f"--trials {args.trials}: at least 1 setting must be scored")
    for path in args.methods or [HERE / "unlearning.py", *sorted((HERE / "methods").glob("*.py"))]:
        method = Method.read(path, evaluation.data.name)
        start = time.perf_counter()
        found = tune(evaluation, method, args.trials)
        minutes = (time.perf_counter() - start) / 60
        write(found, method, evaluation.data.name)
        print(
            f"{method.name}: score {found['score']:.4f} at N = {found['runs']}, {found['config']} ({minutes:.1f} min)",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
