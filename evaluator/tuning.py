"""Searches a method's hyperparameters with Optuna, for the competition's score on the public split.

    python -m evaluator.tuning methods/fanchuan.py          the same budget for every method; resumable
    python -m evaluator.tuning                              every method

What may be tried stands beside each field of a method's Config, as an annotation:
`Annotated[float, (low, high)]`, `(low, high, "log")` for either number type, or a list of choices.
The values found are written to methods/tuned/<data>.json, which `evaluate.py --tuned` uses.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
import typing
from pathlib import Path

from evaluator import report
from evaluator.evaluation import HERE, Evaluation
from evaluator.files import Problem, read_json, write_json
from evaluator.progress import progress
from evaluator.runs import Diverged, Method, unlearned_pool

TRIALS, RUNS = 20, 64  # the budget of a method: settings scored, runs of each,
FINALISTS, TIMES_RUNS = 4, 4  # and how many of the best are scored again with how many times the runs
DRAWN_AT_RANDOM = 8  # trials, before the sampler starts to learn from them


def tuned_values(path: Path | str, data_name: str) -> dict:
    """The Config values found for a method file. Raises Problem where there are none."""
    kept = (read_json(tuned_file(data_name)) or {}).get(Path(path).stem)
    if kept is None:
        raise Problem(f"{path}: has not been tuned on {data_name}: make tune METHOD={path}")
    return kept["config"]


def tuned_file(data_name: str) -> Path:
    return HERE / "methods" / "tuned" / f"{data_name}.json"


def search_space(method: Method) -> dict[str, tuple | list]:
    """Field -> (low, high), (low, high, "log") or a list of choices, of the Config's annotated fields."""
    hints = typing.get_type_hints(method.module.Config, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


def suggest(trial, method: Method) -> dict:
    """Values of a trial for the fields of the search space. A range of a field that is a tuple is for its only entry."""
    values = {}
    for name, allowed in search_space(method).items():
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
    may be twice as many of those. The first setting has the Config's defaults, so that no method starts from what was found
    before. Trials are kept under results/<data>/<split>/tuning, and a search that was cut off goes on there. Returns what
    is written for the method into methods/tuned/<data>.json.
    """
    try:
        import optuna
    except ImportError as error:
        raise Problem("tuning needs Optuna: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Whatever could change a trial's score is in the study's name.
    name = f"{method.name} {method.digest[:12]} {evaluation.retrained.folder.name} {evaluation.runs}"
    journal = evaluation.results / "tuning" / f"{method.name}.journal"
    journal.parent.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    if not study.trials:
        study.enqueue_trial(_published_setting(method))

    def finished() -> list:
        return study.get_trials(states=[optuna.trial.TrialState.COMPLETE])

    def scored() -> list:
        return [trial for trial in finished() if "config" in trial.user_attrs]

    with progress(f"tuning {method.name}", trials, "trial") as bar:
        bar.update(len(scored()))
        while len(scored()) < trials and len(finished()) < 3 * trials:
            # Seeded by what is finished: a search that was cut off goes on as it would have.
            study.sampler = optuna.samplers.TPESampler(seed=len(finished()), n_startup_trials=DRAWN_AT_RANDOM)
            trial = study.ask()
            tried = dataclasses.replace(method, config=method.config | suggest(trial, method))
            try:
                cost = evaluation.cost(tried, repeats=1, at_most=0.5)
                if cost > report.COST_LIMIT:
                    study.tell(trial, report.COST_LIMIT - cost)  # below every score: the search turns back
                    continue
                score = _score(evaluation, tried)
            except Diverged:
                study.tell(trial, -1.0)
                continue
            trial.set_user_attr("config", tried.config)
            trial.set_user_attr("fraction_of_retraining", cost)
            study.tell(trial, score)
            bar.update()
    if not scored():
        raise Problem(f"{method.path}: no setting tried costs less than {report.COST_LIMIT:.0%} of a retraining")
    # Few runs make a noisy score, and the best of many noisy ones is mostly lucky.
    longer = dataclasses.replace(evaluation, runs=TIMES_RUNS * evaluation.runs)

    def final_score(trial) -> float:
        name = f"score of trial {trial.number} at N = {longer.runs}"
        if name not in study.user_attrs:
            try:
                value = _score(longer, dataclasses.replace(method, config=trial.user_attrs["config"]))
            except Diverged:
                value = -1.0
            study.set_user_attr(name, value)
        return study.user_attrs[name]

    finalists = sorted(scored(), key=lambda trial: -trial.value)[:FINALISTS]
    best = max(finalists, key=final_score)
    return {
        "config": best.user_attrs["config"],
        "score": final_score(best),
        "fraction_of_retraining": best.user_attrs["fraction_of_retraining"],
        "runs": longer.runs,
        "trials": f"{len(scored())} at N = {evaluation.runs}, {len(finalists)} of them at N = {longer.runs}",
        "rejected": len(finished()) - len(scored()),
    }


def _published_setting(method: Method) -> dict:
    """The Config's defaults in the terms of the search space, as far as they lie in it."""
    setting, published = {}, dataclasses.asdict(method.module.Config())
    for name, allowed in search_space(method).items():
        value = published[name]
        if isinstance(allowed, list):
            if value in allowed:
                setting[name] = allowed.index(value)
            continue
        value = value[0] if isinstance(value, tuple) else value
        setting[name] = min(max(value, allowed[0]), allowed[1])
    return setting


def _score(evaluation: Evaluation, method: Method) -> float:
    retrained = evaluation.retrained.load(range(evaluation.runs))
    with tempfile.TemporaryDirectory() as folder:  # a trial's runs are not kept, its score is
        setting = dataclasses.replace(evaluation.setting, results=Path(folder))
        pool = unlearned_pool(setting, evaluation.data, evaluation.recipe, method, evaluation.runs)
        scores, _ = report.score(pool.load(range(evaluation.runs)), retrained, evaluation.data)
    return scores["score"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", type=Path, metavar="METHOD", help="method files (default: every one)")
    parser.add_argument("--data", default="digits", help="a name under data/, or any folder in that layout")
    parser.add_argument("--trials", type=int, default=TRIALS, help=f"settings to score for a method (default: {TRIALS})")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"runs of a setting (default: {RUNS})")
    parser.add_argument("--jobs", type=int, help="processes (default: one a core, or one on the GPU)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where trials are kept")
    args = parser.parse_args()
    try:
        evaluation = Evaluation.of(args.data, "public", args.runs, args.results, args.jobs, args.device)
        for path in args.methods or [HERE / "unlearning.py", *sorted((HERE / "methods").glob("*.py"))]:
            method = Method.read(path, evaluation.data.name)
            start = time.perf_counter()
            found = tune(evaluation, method, args.trials)
            minutes = (time.perf_counter() - start) / 60
            file = tuned_file(evaluation.data.name)
            write_json(file, dict(sorted(((read_json(file) or {}) | {method.name: found}).items())))
            print(
                f"{method.name}: score {found['score']:.4f} at N = {found['runs']}, {found['config']} ({minutes:.1f} min)",
                flush=True,
            )
    except Problem as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; finished trials are kept, the same command goes on from there")


if __name__ == "__main__":
    main()
