"""The tables of README and site, from the committed results: `make tables` writes them anew, a test compares.

A table stands between `<!-- table: NAME -->` and `<!-- end -->` in README.md or a page of docs/; `TABLES` says how each
is made.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

from docs import forecasts
from docs.forms import (
    ARMS,
    DASH,
    HARD,
    METHOD,
    MINUS,
    MODELS,
    RANDOM,
    RESULTS,
    ROOT,
    difference,
    markdown,
    mean,
    number,
    over_floor,
    probability,
    reach,
    start,
    summary,
    titled,
    with_interval,
)
from docs.studies import STUDIES
from workbench import storage
from workbench.experiment.results import TITLES
from workbench.plan.road import plan_of
from workbench.values import statistics

BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
BENCHMARKS = {
    "patch-to-logits": "a loop over 144 heads, two hooked forwards each",
    "patch-to-heads": "TransformerLens 4.3 `get_act_patch_direct_path`",
    "patch-to-heads-last": "a loop over later heads, `hook_q_input`",
    "discover-groups": "the four-group sweeps through hooks, grouped-query attention",
    "ablation-profile": "a loop over heads, all positions",
    "ablation-profile-last": "the same at the last token",
}
PLANNED = ("llama3_1b_entity", "llama3_3b_entity", "llama3_1b_tom", "llama3_3b_tom")
MIXTURE = {
    "entity_tracking": "entity tracking, 7 boxes",
    "entity_operations": "with 0 to 12 operations",
    "theory_of_mind": "theory of mind",
    "ioi": "indirect objects",
}
LINEAGE = {
    "depth-4": "4 of 6 layers of an early checkpoint",
    "depth-3": "3 of 6 layers of that checkpoint",
    "checkpoint-3-boxes": "the early checkpoint itself",
    "checkpoint-4-boxes": "its checkpoint at 4 boxes",
    "unrelated": "an unrelated student",
}
GAINS = {
    "[one query a scene][scenes]": ("study_scenes", ("sibling", 70)),
    "[seven thin heads of 64 trained][thin]": ("study_thin", ("sibling", 70)),
    "[an unrelated student][lineage]": ("study_lineage", ("unrelated", 70)),
    "[theory of mind][mind]": ("study_mind_sizes", ("sibling", 300)),
    "[SmolLM2-135M, boxes][boxes]": ("study_smollm2", ("half", 16)),
}
"""Studies of the table of gains and losses: a link whose target stands below the table, and the cell that it shows."""
WAITS = {
    "a training step, two threads, beside a busy process": (
        "busy-neighbour",
        "passive_beside_over_alone",
        "{} of the step alone",
        "1.5",
    ),
    "the same with threads that spin while they wait": (
        "busy-neighbour",
        "active_beside_over_alone",
        "{} of the step alone",
        DASH,
    ),
    "a step alone: threads that sleep against threads that spin": (
        "busy-neighbour",
        "passive_over_active_alone",
        "{}",
        "1.1",
    ),
    "`make demo`, two workers": ("demo", "seconds_two", "{} s", "90 s"),
    "`make demo`, one worker": ("demo", "seconds_one", "{} s", DASH),
    "trainings of a study, two workers against one": ("study-throughput", "ratio", "{} times as many an hour", "2"),
    "`workbench --help`": ("cold-start", "cpu_seconds_help", "{} s of processor time", "0.5 s"),
    "SmolLM2-135M from a GGUF file, first": ("cold-start", "cpu_seconds_gguf_first", "{} s of processor time", "8 s"),
    "SmolLM2-135M from a GGUF file, later": ("cold-start", "cpu_seconds_gguf_later", "{} s of processor time", "2 s"),
    "of which Python, torch and the other libraries": (
        "cold-start",
        "cpu_seconds_imports",
        "{} s of processor time",
        DASH,
    ),
    "a click on a head of SmolLM2-135M, first numbers": ("explorer-head", "seconds_first", "{} s", "0.5 s"),
    "a click on a head of SmolLM2-135M, all exact ones": ("explorer-head", "seconds_exact", "{} s", "3 s"),
    "seven questions of a scene as one prefix, whole model": (
        "shared-prefix",
        "ratio",
        "{} times faster",
        DASH,
    ),
}
"""What a person waits for -> benchmark, its field, the field's form, and what was aimed at."""
DISCOVERIES = (
    *("mind-teacher", "mind-student", "ioi-teacher", "ioi-student"),
    *("operations-teacher", "operations-student", "entity-teacher", "smollm2-ioi", "smollm2-boxes"),
)
"""Subjects of `python -m docs.methods` that a page shows."""
VARIANTS = {
    "as-it-is": "the method as it is",
    "procrustes": "Procrustes in place of CKA",
    "residual-stream": "heads compared by what they write to the residual stream",
    "debiased": "the debiased estimator in the loss",
    "own-positions": "each head where it acts, not at every label",
    "last-token": "every head at the last token",
    "queries-and-outputs": "keys and values stay as they are",
    "four-groups": "circuit of the four groups alone, without the paths of labels",
    "two-heads-a-group": "two heads a group",
    "paper-matching": "the paper's matching by impact",
}

FAMILY = {
    "cka": "CKA of activations",
    "procrustes": "Procrustes of activations",
    "differences": "CKA of differences",
    "interchange": "interchange (DIITO)",
    "interchange-cka": "interchange + CKA of activations",
}
"""Students of `study_mind_family`: one model, each aligned by another member of the family."""


def demo() -> str:
    """Every condition of `make demo`."""
    head = (
        "condition",
        "full accuracy (95 %)",
        "circuit accuracy (95 %)",
        "random circuit",
        "faithfulness",
        "CKA (floor)",
        "trained",
        "p vs full CE",
        "p vs circuit CE",
    )

    def row(found: Mapping[str, Any]) -> list[str]:
        parts = [
            f"{found[f'{part}_accuracy']:.3f} "
            f"[{found[f'{part}_interval'][0]:.2f},{HARD}{found[f'{part}_interval'][1]:.2f}]"
            for part in ("full", "circuit")
        ]
        cka = over_floor(found["mean_cka"], found["cka_floor"])
        tests = [number(found["mcnemar"].get(other), 4) for other in ("full_ce", "circuit_ce")]
        numbers = (
            number(found["random_circuit_accuracy"]),
            number(found["faithfulness"], 2),
            cka,
            f"{found['trained_fraction']:.0%}",
        )
        return [titled(found["condition"]), *parts, *numbers, *tests]

    return markdown(head, map(row, storage.read_json(RESULTS / "demo/results.json")))


def study(name: str, which: tuple[str, int]) -> str:
    """The conditions of one cell of a study."""
    conditions = summary(name)[which]["conditions"]

    def row(condition: str) -> list[str]:
        values = conditions[condition]
        cka = over_floor(*(None if values[name] is None else values[name]["mean"] for name in ("cka", "cka_floor")))
        accuracies = [with_interval(values[part]) for part in ("full", "circuit")]
        return [titled(condition), *accuracies, number(values["random_circuit"]["mean"]), cka]

    head = ("condition", "full", "circuit alone", "random circuit", "CKA (floor)")
    return markdown(head, [row(condition) for condition in TITLES if condition in conditions])


def gains(name: str, words: Mapping[tuple[str, int], str], first: str) -> str:
    """One row a cell of a study (a student and its training scenes): circuit CE, CE + CKA and the difference of each
    part over seeds, and random partners where they were trained; the CKA is that of the untrained student on the
    discovery prompts."""
    cells = summary(name)
    controlled = any(RANDOM in cells[which]["conditions"] for which in words)
    arms = ("CE", "CE + CKA", "difference", *(("CE + random CKA",) if controlled else ()))
    head = (first, "heads trained", "CKA before", *(f"{part}: {arm}" for part in ("full", "alone") for arm in arms))

    def part_of(which: tuple[str, int], part: str) -> list[str]:
        cell = cells[which]
        random_arm = cell["conditions"].get(RANDOM)
        return [
            number(plain(cells, which)[part]["mean"]),
            number(cell["conditions"][METHOD][part]["mean"]),
            difference(cell["comparisons"]["circuit_ce"][METHOD][part]["over_seeds"]),
            *([DASH if random_arm is None else with_interval(random_arm[part])] if controlled else []),
        ]

    def row(which: tuple[str, int]) -> list[str]:
        heads = f"{cells[which]['heads_trained']['heads']} of {cells[which]['heads_trained']['of']}"
        before = number(start(name, *which)["cka"], 2)
        return [words[which], heads, before, *part_of(which, "full"), *part_of(which, "circuit")]

    return markdown(head, [row(which) for which in words])


def plain(cells: Mapping[tuple[str, int], Mapping[str, Any]], which: tuple[str, int]) -> Mapping[str, Any]:
    """Circuit CE of a cell, or of its student's baseline where that stands for it."""
    student, scenes = cells[which].get("baseline") or which[0], which[1]
    return cells[student, scenes]["conditions"]["circuit_ce"]


def differences(name: str) -> str:
    """The arms of a study that align beside cross-entropy, minus circuit CE, full model and circuit alone: intervals
    over seeds and over prompts, and the exact McNemar test pooled over seeds."""
    parts = {"full": "full", "circuit": "circuit alone"}
    figures = ("over prompts", "p")
    head = ("cell", "arm", *(each for words in parts.values() for each in (f"{words}, over seeds", *figures)))

    def row(student: str, cell: Mapping[str, Any], condition: str) -> list[str]:
        found = cell["comparisons"]["circuit_ce"][condition]
        cells = [
            entry
            for part in parts
            for entry in (
                difference(found[part]["over_seeds"]),
                reach(found[part]["over_prompts"]),
                probability(found[part]["pooled_p"]),
            )
        ]
        arm = f"**{ARMS[condition]}**" if condition == METHOD else ARMS[condition]
        return [f"{student}, {cell['train_prompts']:,} prompts", arm, *cells]

    return markdown(
        head,
        [
            row(student.replace("-", " "), cell, condition)
            for (student, _), cell in summary(name).items()
            for condition in ARMS
            if condition in cell["comparisons"].get("circuit_ce", {})
        ],
    )


def gains_and_losses() -> str:
    """What alignment gained or lost over training the same heads on cross-entropy, a row a study."""
    head = ("study", "prompts", "circuit / CE", "CE + CKA", "difference", "circuit alone")

    def row(words: str, name: str, which: tuple[str, int]) -> list[str]:
        cells = summary(name)
        cell = cells[which]
        accuracies = [number(of["full"]["mean"]) for of in (plain(cells, which), cell["conditions"][METHOD])]
        gained = cell["comparisons"]["circuit_ce"][METHOD]
        parts = [difference(gained[part]["over_seeds"]) for part in ("full", "circuit")]
        return [words, f"{cell['train_prompts']:,}", *accuracies, *parts]

    return markdown(head, [row(words, *where) for words, where in GAINS.items()])


def family(name: str, scenes: int) -> str:
    """A row a member of the family of alignments, the one that validation chose in bold; dashes where the study has not
    come to it yet."""
    less = "minus circuit / CE"
    head = ("what is aligned", "lambda", "validation", "full", less, "circuit alone", less)
    cells = summary(name) if (RESULTS / name / "summary.json").exists() else {}
    rows: list[list[str]] = []
    for student, words in FAMILY.items():
        cell = cells.get((student, scenes))
        rows += [[words, *[DASH] * (len(head) - 1)]] if cell is None else family_rows(cell, words)
    return markdown(head, rows)


def family_rows(cell: Mapping[str, Any], words: str) -> Iterable[list[str]]:
    """The rows of one member: what was trained without alignment, where it stands in this cell, the member itself, and
    its random partners where they were trained."""

    def row(title: str, condition: str, *tried: str) -> list[str]:
        of, against = cell["conditions"][condition], cell["comparisons"].get("circuit_ce", {}).get(condition)
        cells = [
            entry
            for part in ("full", "circuit")
            for entry in (with_interval(of[part]), DASH if against is None else difference(against[part]["over_seeds"]))
        ]
        return [title, *(tried or (DASH, DASH)), *cells]

    there, weight = cell["conditions"], cell["weight"]
    yield from (row(titled(plain), plain) for plain in ("base", "full_ce", "circuit_ce") if plain in there)
    validated = number(mean(cell["validation_accuracy"].get(str(weight), [])))
    yield row(f"**{words}**" if cell["best"] else words, METHOD, f"{weight:g}", validated)
    if RANDOM in there:
        yield row("the same with random partners", RANDOM, f"{weight:g}", DASH)


def transfer(name: str, cell: tuple[str, int]) -> str:
    """Accuracy on the other tasks after training on a study's own, and its change from the untrained student's."""
    found: Mapping[str, Any] = summary(name)[cell]["transfer"]

    def entries(condition: str) -> Iterable[str]:
        for task in found:
            of = found[task][condition]
            yield with_interval(of["accuracy"])
            yield DASH if condition in ("base", "teacher") else difference(of["change"]["over_seeds"])

    conditions = [condition for condition in TITLES if condition in next(iter(found.values()))]
    head = ["trained on theory of mind", *(title for task in found for title in (MIXTURE[task], "change"))]
    return markdown(head, [[titled(condition), *entries(condition)] for condition in conditions])


def run(name: str) -> str:
    """The conditions of a run over several seeds: means with t intervals over seeds."""
    rows = storage.read_json(RESULTS / name / "results.json")
    conditions = [condition for condition in TITLES if any(row["condition"] == condition for row in rows)]

    def row(condition: str) -> list[str]:
        mine = [each for each in rows if each["condition"] == condition]
        seeds = mine if condition != "base" else mine[:1]  # nothing is trained there, so seeds repeat it
        parts = [over_seeds([each[f"{part}_accuracy"] for each in seeds]) for part in ("full", "circuit")]
        random, cka, floor = (
            mean([each[name] for each in mine]) for name in ("random_circuit_accuracy", "mean_cka", "cka_floor")
        )
        return [titled(condition), *parts, number(random), over_floor(cka, floor), f"{mine[0]['trained_fraction']:.0%}"]

    return markdown(
        ("condition", "full", "circuit alone", "random circuit", "CKA (floor)", "trained"), map(row, conditions)
    )


def over_seeds(values: Sequence[float]) -> str:
    """Mean and 95 % t interval of some seeds."""
    return with_interval(statistics.mean_interval(values).to_json())


def discovery(subject: str) -> str:
    """Every method of discovery on one model and task, those with the largest CPR first."""
    rows = storage.read_json(RESULTS / f"discovery/{subject}.json")["methods"]
    shares = list(next(iter(rows.values()))["faithfulness"])

    def row(method: str) -> list[str]:
        found = rows[method]
        values = [*(found["faithfulness"][share] for share in shares), found["cpr"], found["cmd"]]
        alone = f"{len(found['circuit'])} ({found['circuit_faithfulness']:.2f})"
        cost = f"{found['seconds_in_forwards']:.0f}"
        cells = [*(f"{value:.2f}" for value in values), alone, cost, f"{found['runs_at_most']:,}"]
        return [f"`{method}`", *(cell.replace("-0.00", "0.00").replace("-", MINUS) for cell in cells)]

    sizes = next(iter(rows.values()))["sizes"]
    titles = [f"{float(share):.0%} ({sizes[share]})".replace("%", f"{HARD}%") for share in shares]
    head = ("method", *titles, "CPR", "CMD", "circuit's heads (f)", "cost", "runs at most")
    return markdown(head, [row(method) for method in sorted(rows, key=lambda method: -rows[method]["cpr"])])


def worth() -> str:
    """What the heads that each method ranks first are worth for distillation on theory of mind, over seeds: accuracy on
    validation stories, and the matched pairs' CKA before."""
    trainings = storage.read_json(RESULTS / "discovery/mind-worth.json")["rows"].values()
    arms = ("circuit CE", "CE + CKA")

    def row(method: str) -> tuple[float, list[str]]:
        of = {arm: [each for each in trainings if (each["method"], each["arm"]) == (method, arm)] for arm in arms}
        values = {arm: [each["accuracy"] for each in of[arm]] for arm in arms}
        gains = [aligned - plain for plain, aligned in zip(*values.values(), strict=True)]
        before = of["CE + CKA"][0]["cka_before"]
        cells = [*(over_seeds(values[arm]) for arm in arms), over_seeds(gains).replace("-", MINUS), number(before, 2)]
        return sum(values["circuit CE"]) / len(values["circuit CE"]), [f"`{method}`", *cells]

    rows = sorted(map(row, dict.fromkeys(each["method"] for each in trainings)), reverse=True)
    return markdown(("heads ranked by", *arms, "gain of CKA", "CKA before"), [cells for _, cells in rows])


def two_tokens() -> str:
    """What students learn of answers of two tokens; the study's own file says what its conditions are."""
    from docs.two_tokens import table

    return table()


def circuit_heads(folder: str) -> str:
    """A circuit head by head: where each is needed, what it looks at, reads and writes."""
    heads = storage.read_json(RESULTS / folder / "heads.json")["heads"]

    def listed(values: Mapping[str, float], form: str, most: int = 3) -> str:
        some = list(values.items())[:most]
        return ", ".join(f"{name} {value:{form}}" for name, value in some).replace("-", MINUS).replace("_", " ") or DASH

    def rows() -> Iterable[list[str]]:
        for head, of in heads.items():
            reads = {name.replace(" -> ", " into "): value for name, value in of["reads"].items()}
            for place, looks in of["looks"].items():
                cost = f"{of['costs'][place]:.2f}".replace("-", MINUS)
                first = place == next(iter(of["looks"]))
                beside = [listed(reads, ".1f"), listed(of["writes"], ".1f")] if first else ["", ""]
                yield [head, place.replace("_", " "), cost, listed(looks, ".2f", 2), *beside]

    return markdown(("head", "needed at", "costs", "looks at", "reads", "writes into"), rows())


def carries(folder: str) -> str:
    """What that circuit carries beside random ones and the strongest single ablations."""
    of = storage.read_json(RESULTS / folder / "heads.json")["carries"]
    size = of["size"]
    rows = [
        ["the whole model", number(of["whole"]["accuracy"])],
        [f"**the circuit, {size} heads**", number(of["circuit"]["accuracy"])],
        [f"the {size} of largest single ablation", number(of["top by single ablation"]["accuracy"])],
        ["the six of largest single ablation", number(of["top six by single ablation"]["accuracy"])],
        [
            f"{size} random heads: mean of {of['random']['circuits']}, most",
            f"{number(of['random']['mean'])}, {number(of['random']['most'])}",
        ],
        ["no head", number(of["nothing"]["accuracy"])],
        ["the model without the circuit", number(of["without it"])],
    ]
    return markdown(("kept, all other heads at their mean", "accuracy"), rows)


def mixture() -> str:
    """Accuracy of the mixture's models on every task."""
    found = [
        storage.read_json(MODELS / f"mixture-{name}/accuracies.json")
        for name in ("teacher", "student", "unrelated-student")
    ]

    def entry(of: Mapping[str, Any]) -> str:
        return f"{of['accuracy']:.3f} [{of['interval'][0]:.3f},{HARD}{of['interval'][1]:.3f}]"

    rows = [
        [f"{words} ({found[0][task]['chance']:.2f})", *(entry(each[task]) for each in found)]
        for task, words in MIXTURE.items()
    ]
    return markdown(("task (chance)", "teacher", "student of its lineage", "unrelated student"), rows)


def benchmarks() -> str:
    """The patching benchmarks of `make bench`."""
    found = {each["name"]: each for each in storage.read_json(ROOT / "benchmarks/results.json")}
    rows = [
        [f"`{name}`", against, *(f"{found[name][key]:.1f}" for key in ("ratio", "forwards", "floor_ratio"))]
        for name, against in BENCHMARKS.items()
    ]
    return markdown(("benchmark", "against", "ratio", "forwards", "time / bare matrix products"), rows)


def waits() -> str:
    """What a person waits for, as `make bench` measured it, beside what was aimed at; dashes for what it did not."""
    found = {each["name"]: each for each in storage.read_json(ROOT / "benchmarks/results.json")}

    def measured(name: str, key: str, form: str) -> str:
        value = found.get(name, {}).get(key)
        return DASH if value is None else form.format(value)

    rows = [[what, measured(name, key, form), goal] for what, (name, key, form, goal) in WAITS.items()]
    return markdown(("what", "measured", "aimed at"), rows)


@cache
def planned(name: str) -> Any:
    """A recipe's plan as JSON; made once, since its prompts are drawn and read for it."""
    return json.loads(json.dumps(plan_of(name).to_json()))


def plans() -> str:
    """What the paper's own runs cost, as `workbench plan` says."""
    head = "recipe", "hours", "peak memory", "teacher's outputs and students on disk"
    totals = {name: planned(name)["total"] for name in PLANNED}
    rows = [
        [f"`{name}`", f"{of['hours']:.1f}", f"{of['memory'] / 1e9:.0f} GB", f"{of['disk'] / 1e9:.0f} GB"]
        for name, of in totals.items()
    ]
    return markdown(head, rows)


SIZES = (70, 280, 1050)
STUDENTS = {"sibling": "a student of the lineage", "unrelated": "an unrelated student"}
STORIES = tuple(product(STUDENTS, (300, 1000)))
THIN = tuple(product(STUDENTS, (70, 280)))
"""Cells of `study_mind_sizes` and `study_thin`."""
METHODS = {
    "path patching": "path patching",
    "activation patching": "activation patching",
    "ablation": "ablation",
    "logit attribution": "logit attribution",
    "edge attribution": "edge attribution",
    "circuits of edges": "circuits of edges",
    "alignment and training": "CKA, training",
    "saving a student": "saved",
}
"""What `check-model` asks of a model -> the column of the table of families."""


def families() -> str:
    """Families x methods: a row a family, as its miniature was tried."""

    def cell(method: Mapping[str, Any]) -> str:
        if not method["possible"]:
            return DASH
        return next((way for way in ("replay", "hook") if way in method["how"]), "yes").replace("hook", "hooks")

    rows = storage.read_json(RESULTS / "families.json")["families"]
    tried = {name: found for name, found in rows.items() if "refused" not in found}
    return markdown(
        ("family", *METHODS.values()),
        ([name, *(cell(found["methods"][method]) for method in METHODS)] for name, found in sorted(tried.items())),
    )


TABLES: Mapping[str, Callable[[], str]] = {
    "families": families,
    "gains-and-losses": gains_and_losses,
    **forecasts.TABLES,
    "demo": demo,
    **{f"study-scenes-{size}": partial(study, "study_scenes", ("sibling", size)) for size in SIZES},
    **{f"study-few-heads-{size}": partial(study, "study_few_heads", ("sibling", size)) for size in SIZES},
    **{f"study-smollm2-{size}": partial(study, "study_smollm2", ("half", size)) for size in (4, 16)},
    **{
        f"study-smollm2-positions-{scenes}": partial(study, "study_smollm2_positions", ("half", scenes))
        for scenes in (4, 8)
    },
    "study-smollm2-paths-4": partial(study, "study_smollm2_paths", ("half", 4)),
    **{f"study-quarter-{size}": partial(study, "study_quarter", ("sibling", size)) for size in SIZES[:2]},
    **{f"study-mind-{name}": partial(study, "study_mind", (name, 1000)) for name in STUDENTS},
    **{f"study-mind-whole-{name}": partial(study, "study_mind_whole", (name, 300)) for name in STUDENTS},
    **{f"study-mind-sizes-{name}-{size}": partial(study, "study_mind_sizes", (name, size)) for name, size in STORIES},
    "mind-gains": lambda: gains(
        "study_mind_sizes",
        {(name, size): f"{STUDENTS[name]}, {size:,} stories" for name, size in STORIES},
        "student and stories",
    ),
    **{f"study-thin-{name}-{size}": partial(study, "study_thin", (name, size)) for name, size in THIN},
    "thin-gains": lambda: gains(
        "study_thin",
        {(name, size): f"{STUDENTS[name]}, {size} prompts" for name, size in THIN},
        "student and prompts",
    ),
    "study-mind-family": partial(family, "study_mind_family", 300),
    **{f"study-entity-{name}": partial(study, "study_entity", (name, 10)) for name in STUDENTS},
    "study-entity-sibling-40": partial(study, "study_entity", ("sibling", 40)),
    "study-lineage": lambda: gains("study_lineage", {(name, 70): words for name, words in LINEAGE.items()}, "student"),
    "study-lineage-data": lambda: gains(
        "study_lineage_data",
        {
            (name, count): f"{LINEAGE[name]}, {count:,} prompts"
            for name in ("depth-3", "unrelated")
            for count in (280, 1050)
        },
        "student and data",
    ),
    "study-methods": lambda: gains(
        "study_methods", {(name, 70): words for name, words in VARIANTS.items()}, "what is changed"
    ),
    **{
        f"differences-{name}": partial(differences, f"study_{name}") for studies in STUDIES.values() for name in studies
    },
    **{f"discovery-{name}": partial(discovery, name) for name in DISCOVERIES},
    "discovery-worth": worth,
    "two-tokens": two_tokens,
    "mind-heads": partial(circuit_heads, "mind_circuit"),
    "mind-carries": partial(carries, "mind_circuit"),
    "thin-heads": partial(circuit_heads, "study_thin"),
    "thin-carries": partial(carries, "study_thin"),
    "transfer": lambda: transfer("study_mind", ("sibling", 1000)),
    "plans": plans,
    "boxes": lambda: run("smollm2_boxes"),
    "two-tokenizers": lambda: run("smollm2_to_bundled"),
    "mixture": mixture,
    "benchmarks": benchmarks,
    "waits": waits,
}


@cache
def table(name: str) -> str:
    """A table as it is now; made once, since a plan takes a while."""
    return TABLES[name]()


def filled(text: str) -> str:
    """A text with every table made anew. Errors: `KeyError` for a table that nothing makes."""
    return BLOCK.sub(lambda block: f"{block[1]}{table(block['name'])}\n{block[3]}", text)


def pages() -> list[Path]:
    """README and every page of docs/ that holds a table."""
    there = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in there if BLOCK.search(path.read_text())]


if __name__ == "__main__":
    for page in pages():
        storage.write_text(page, filled(page.read_text()))
