"""The page ``report.md``, rendered from the content of ``report.json`` and no other file."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jobs.markdown import block, code, duration, literal, one_line, percent, table
from jobs.measures.core.run import GPT2_XL_CORE
from jobs.plots import scientific

Report = Mapping[str, Any]


class Published(NamedTuple):
    """A model with a published CORE. ``note`` quotes published facts about its size and training."""

    name: str
    core: float
    note: str


PUBLISHED = (
    Published("GPT-2 XL", GPT2_XL_CORE, "1.6 G parameters, 2019"),
    Published("karpathy/nanochat, depth 24 (March 2026)", 0.2626, "8 H100, 1.65 h; held-out bits per byte 0.7180"),
    Published("karpathy/nanochat, depth 20 (first articles)", 0.22, "4e19 FLOPs, 4 h"),
)

TITLES = {"base": "pretraining", "sft": "fine-tuning", "rl": "reinforcement learning", "lesson": "teaching"}
PROGRAMS = {"base": "jobs.train.pretrain", "sft": "jobs.train.sft", "rl": "jobs.train.rl", "lesson": "jobs.teach"}
_UNITS = {"val_bpb": "bpb", "val_loss": "nats"}
# For each section with plots: the caption and the file name of each plot.
_PLOTS = {
    "Training": {"Loss curves": "loss.png", "Learning rates and gradient norms": "schedule.png"},
    "Held-out conversations": {"Held-out conversations by kind": "conversations.png"},
    "CORE": {"CORE by task": "core.png"},
    "Reinforcement learning": {"Reward and pass@k": "rl.png"},
}
# The messages, calls, outputs and expected answers of quoted examples, and the samples that were written during
# pretraining, are cut after this number of characters.
_MOST_CHARACTERS = 400
# At most this many right and wrong answers of each chat task are quoted.
_RIGHT_ANSWERS, _WRONG_ANSWERS = 1, 3
# Of the steps at which training wrote samples, at most this many are shown: the first, the last, and some between them.
_SAMPLED_STEPS = 5
# Of the steps at which the model answered the questions of ``--ask`` during training, at most this many are shown.
_ANSWERING_SNAPSHOTS = 10


def render(report: Report, plots: Sequence[str] = ()) -> str:
    """Return the page ``report.md``. ``plots`` are files beside the page. A section without lines is left out."""
    sections = [_head(report)]
    for title, section in _SECTIONS.items():
        if lines := section(report):
            drawn = {caption: plot for caption, plot in _PLOTS.get(title, {}).items() if plot in plots}
            images = [f"![{caption}]({plot})\n" for caption, plot in drawn.items()]
            sections.append([f"## {title}", "", *images, *lines])
    return "\n".join("\n".join(lines).rstrip() + "\n" for lines in sections)


def _stages_of(report: Report) -> dict[str, Report]:
    """The stages that the model has, in the order of training."""
    return {stage: report[stage] for stage in TITLES if stage in report}


def _chat_results(report: Report) -> list[tuple[str, Report]]:
    """Each evaluation on chat tasks, with its stage."""
    return [(stage, result) for stage, results in report["chat_results"].items() for result in results]


def _head(report: Report) -> list[str]:
    shape = report["shape"]
    recipe = f", recipe {code(report['recipe'])}" if report["recipe"] else ""
    return [
        f"# {report['model']}: report",
        "",
        f"A model of {shape['parameters']:,} parameters: {shape['layers']} layers of width {shape['width']}, "
        f"{shape['vocab_size']:,} token ids, a context of {shape['context_length']:,} tokens{recipe}. "
        f"This is {code(report['revision'])}.",
        "",
        *table(("at a glance", ""), _glance(report)),
        "",
        *(f"> **Note:** {literal(warning)}\n" for warning in report["warnings"]),
    ]


def _glance(report: Report) -> Iterable[tuple[str, str]]:
    chat, base = report.get("chat"), report.get("base", {})
    if chat:
        items = sum(kind["items"] for kind in chat["kinds"].values())
        yield "held-out conversations answered right", f"**{chat['accuracy']:.1%}** of {items}"
    if "held_out_bits_per_byte" in base:
        ours, xz = base["held_out_bits_per_byte"], base["xz_9_bits_per_byte"]
        yield "bits per byte of held-out text", f"**{ours:.3f}** (`xz -9`: {xz:.3f})"
    for stage, result in report["core_results"].items():
        partial = ", partial" if result["missing"] else ""
        yield f"CORE after {TITLES[stage]}", f"**{result['core']:.4f}**{partial} (GPT-2 XL: {GPT2_XL_CORE:.4f})"
    for stage, result in _chat_results(report):
        if result["chatcore"] is not None:
            partial = ", partial" if result["missing"] else ""
            yield f"ChatCORE after {TITLES[stage]}", f"**{result['chatcore']:.4f}**{partial}"
    curve = report.get("rl", {}).get("rl") or {}
    if curve.get("heldout_reward"):
        first, _, last = curve["heldout_reward"]
        yield "held-out reward, before and after RL", f"{first:.3f} → **{last:.3f}**"
    seconds = [stage["train_seconds"] for stage in _stages_of(report).values()]
    if seconds and all(seconds):
        yield "training", duration(sum(seconds))
        if (price := report["price_per_hour"]) is not None:
            yield "cost of that", f"{sum(seconds) / 3600 * price:.2f} at {price:g} an hour"
    if promotion := report["promotion"]:
        why = next((f": {literal(rule['reason'])}" for rule in promotion["rules"] if rule["passed"] is False), "")
        yield "promotion", _verdict(promotion) + why


def _verdict(promotion: Report) -> str:
    if promotion["promoted"]:
        return "promoted"
    return "may be promoted" if promotion["accepted"] else "**refused**"


def _training(report: Report) -> list[str]:
    stages = _stages_of(report)
    rows = [
        (
            TITLES[name],
            code(stage["revision"]),
            _or_dash(stage["steps"], "{:,}"),
            _or_dash(stage["tokens"], "{:,}"),
            "—" if not stage["train_seconds"] else duration(stage["train_seconds"]),
            _or_dash(stage["tokens_per_second"], "{:,.0f}"),
            percent(stage["mfu"]),
            "—" if stage["flops"] is None else scientific(stage["flops"]),
            _or_dash(stage["final_loss"], "{:.3f}"),
            ", ".join(f"{value:.3f} {_unit(name)}" for name, value in stage["held_out"].items()) or "—",
        )
        for name, stage in stages.items()
    ]
    known = [stage["train_seconds"] for stage in stages.values() if stage["train_seconds"]]
    if len(known) > 1:
        rows.append(("**all**", "", "", "", duration(sum(known)), "", "", "", "", ""))
    header = ("stage", "checkpoint", "steps", "tokens", "time", "tokens/s", "MFU", "FLOPs", "loss", "held out")
    return [
        *table(header, rows),
        "",
        *_data_and_gradients(stages),
        *_learning_rates(stages),
        *(f"{line}\n" for line in _hardware(report)),
    ]


def _unit(name: str) -> str:
    """The unit of a held-out metric, and the dataset if the metric is of one dataset of a mixture."""
    if name.startswith("val_bpb_"):
        return f"{_UNITS['val_bpb']} on {literal(name.removeprefix('val_bpb_'))}"
    return _UNITS.get(name, literal(name))


def _data_and_gradients(stages: Mapping[str, Report]) -> list[str]:
    """How often each stage saw its data, how much of the data it left out, and the size of the gradients."""
    rows = []
    # A report of an earlier version has neither ``data`` nor ``gradient_norm``, so ``get`` is used.
    for name, stage in stages.items():
        data, norm = stage.get("data", {}), stage.get("gradient_norm") or {}
        cut, left_out = data.get("cut"), data.get("left_out")
        rows.append(
            (
                TITLES[name],
                _or_dash(data.get("epochs"), "{:.2f}"),
                percent(data.get("unseen_share")),
                percent(data.get("cropped_share")),
                "—" if cut is None else f"{cut:,} cut, {left_out:,} left out",
                _or_dash(norm.get("median"), "{:.3g}"),
                _or_dash(norm.get("largest"), "{:.3g}"),
            )
        )
    if all(cell == "—" for row in rows for cell in row[1:]):
        return []
    header = (
        "stage", "epochs", "documents not fully seen", "tokens cut off", "too long for a row", "gradient norm, median",
        "largest",
    )  # fmt: skip
    return [*table(header, rows), ""]


def _learning_rates(stages: Mapping[str, Report]) -> list[str]:
    """The highest learning rate of each group of parameters in each stage."""
    rates = {name: stage["learning_rates"] for name, stage in stages.items() if stage.get("learning_rates")}
    groups = dict.fromkeys(group for by_group in rates.values() for group in by_group)
    rows = [
        (literal(group.replace("_", " ")), *(_or_dash(by_group.get(group), "{:.3g}") for by_group in rates.values()))
        for group in groups
    ]
    return [*table(("highest learning rate of", *(TITLES[name] for name in rates)), rows), ""] if rows else []


def _hardware(report: Report) -> Iterable[str]:
    stages, places = _stages_of(report), dict[str, list[str]]()
    for name, stage in stages.items():
        if hardware := stage["hardware"]:
            ranks = f" on {hardware['ranks']} ranks" if hardware["ranks"] > 1 else ""
            precision = f", {stage['dtype']}" if stage["dtype"] else ""
            places.setdefault(f"{_machine(hardware)}{ranks}{precision}", []).append(TITLES[name])
    for place, names in places.items():
        listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        yield f"{listed.capitalize()}: {literal(place)}."
    yield f"Evaluated on {literal(_machine(report['machine']))}."
    for stage in stages.values():
        if stage["made_from"]:
            yield f"{code(stage['revision'])} was trained from {code(stage['made_from'])}."


def _machine(machine: Report) -> str:
    return f"{machine['processor']} ({machine['cores']} cores, torch {machine['torch']})"


def _configuration(report: Report) -> list[str]:
    lines = ["These commands repeat each stage; `report.json` beside this page lists every setting.", "", "```sh"]
    for name, stage in _stages_of(report).items():
        if stage["settings"]:
            flags = " ".join(_flag(key, value) for key, value in stage["settings"].items() if value not in (None, ""))
            lines.append(f"python -m {PROGRAMS[name]} --model {report['model']} {flags}")
    return [*lines, "```", ""] if len(lines) > 3 else []


def _flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    text = ",".join(map(str, value)) if isinstance(value, list) else one_line(str(value))
    plain = all(character.isalnum() or character in "._:,/+-" for character in text)
    return f"--{flag} {text}" if plain else f"--{flag} '{text}'"


def _tokenizer(report: Report) -> list[str]:
    tokenizer = report["tokenizer"]
    on_text = tokenizer.get("held_out_bytes_per_token")
    about = f", {on_text:.2f} bytes per token of the held-out text" if on_text else ""
    lines = [f"{tokenizer['vocab_size']:,} ids{about}.", ""]
    if not (domains := tokenizer.get("domains")):
        return lines
    references = domains["references"]
    header = ["bytes per token", "this tokenizer", *(f"{name} ({size:,} ids)" for name, size in references.items())]
    rows = [
        [
            text,
            f"{counted['bytes'] / counted['tokens']:.2f}",
            *(f"{counted['bytes'] / counted['reference_tokens'][name]:.2f}" for name in references),
        ]
        for text, counted in domains["texts"].items()
    ]
    return [*lines, *table(header, rows), ""]


def _held_out_text(report: Report) -> list[str]:
    base = report.get("base", {})
    if "held_out_bits_per_byte" not in base:
        return []
    rows = [
        ("this model", f"{base['held_out_bits_per_byte']:.3f}"),
        ("`xz -9` on the same text", f"{base['xz_9_bits_per_byte']:.3f}"),
    ]
    return [*table(("bits per byte", ""), rows), ""]


def _core(report: Report) -> list[str]:
    if not (results := report["core_results"]):
        return []
    scores: list[tuple[str, ...]] = [
        (f"**{report['model']}** after {TITLES[stage]}", f"**{result['core']:.4f}**", _completeness(result))
        for stage, result in results.items()
    ]
    scores += [(literal(other.name), f"{other.core:.4f}", literal(other.note)) for other in PUBLISHED]
    lines = [*table(("model", "CORE", ""), scores), ""]
    stage, last = list(results.items())[-1]
    rows = [
        (
            literal(name),
            literal(task["kind"].replace("_", " ")),
            str(task["shots"]),
            f"{task['answers']:,}",
            f"{task['accuracy']:.1%}",
            f"{task['baseline']:.1%}",
            f"{task['centered']:.4f}",
        )
        for name, task in last["tasks"].items()
    ]
    header = (f"task, after {TITLES[stage]}", "type", "shots", "answers", "accuracy", "chance", "centered")
    return [*lines, *table(header, rows), ""]


def _completeness(result: Report) -> str:
    return f"partial: {len(result['tasks'])} tasks" if result["missing"] else f"{len(result['tasks'])} tasks"


def _chat_tasks(report: Report) -> list[str]:
    lines: list[str] = []
    for stage, result in _chat_results(report):
        if result["chatcore"] is not None:
            partial = f" ({_completeness(result)})" if result["missing"] else ""
            lines += [f"ChatCORE after {TITLES[stage]}: **{result['chatcore']:.4f}**{partial}.", ""]
        rows = [
            (
                literal(name),
                f"{task['right']:,}",
                f"{task['answers']:,}",
                percent(task["accuracy"]),
                percent(task["baseline"]),
                f"{task['centered']:.4f}",
                ", ".join(f"{k}: {share:.1%}" for k, share in _by_k(task.get("pass_at_k", {}))) or "—",
            )
            for name, task in result["tasks"].items()
        ]
        header = (f"task, after {TITLES[stage]}", "right", "of", "accuracy", "chance", "centered", "pass@k")
        lines += [*table(header, rows), ""]
        for name, task in result["tasks"].items():
            answered = [example for example in task["examples"] if example["answer"]]
            right = [example for example in answered if example["right"]][:_RIGHT_ANSWERS]
            wrong = [example for example in answered if not example["right"]][:_WRONG_ANSWERS]
            if answered:
                lines += [f"### {literal(name)}", ""]
            for example in right + wrong:
                lines += _exchange(example)
    return lines


def _conversations(report: Report) -> list[str]:
    if not (chat := report.get("chat")):
        return []
    items = sum(kind["items"] for kind in chat["kinds"].values())
    lines = [
        f"{chat['accuracy']:.1%} of {items} answers right. No training conversation of the recipe contains one of "
        "these user messages. The answer to a calculation, or to a question about the letters of a word, is right only "
        "if it called the Python tool.",
        "",
    ]
    rows = [
        (name, str(kind["right"]), str(kind["items"]), f"{kind['right'] / max(kind['items'], 1):.1%}")
        for name, kind in chat["kinds"].items()
    ]
    lines += [*table(("kind", "right", "of", "accuracy"), rows), ""]
    if chat["examples"]:
        lines += ["### Some of them", ""]
    for example in chat["examples"]:
        lines += _exchange(example)
    if chat.get("wrong"):
        lines += ["### Other wrong answers", ""]
    for example in chat.get("wrong", []):
        lines += _exchange(example)
    return lines


def _exchange(example: Report) -> list[str]:
    """Markdown of an example: the messages up to the user's question, then the model's tool calls, then its answer."""
    turns = [*example.get("before", []), ("user", example["question"])]
    lines: list[str] = []
    for role, text in turns:
        shown = _shown(text)
        if len(turns) > 1:
            shown = [f"**{role}:** {shown[0]}"] if len(shown) == 1 else [f"**{role}:**", "", *shown]
        lines += [f"> {line}".rstrip() for line in shown] + [">"]
    lines[-1] = ""
    for ran, output in example["calls"]:
        if "\n" in ran.strip() or "\n" in output.strip():
            lines += [*_shown(ran, always=True), "", "gives", "", *_shown(output, always=True), ""]
        else:
            # In Markdown, two spaces at the end of a line make a line break.
            lines.append(f"{code(_cut(ran))} gives {code(_cut(output))}  ")
    answer = _shown(example["answer"]) if example["answer"].strip() else ["*(no answer)*"]
    mark = ""
    if not example["right"]:
        expected = example.get("expected")
        mark = f"*(wrong; expected: {literal(_cut(expected))})*" if expected else "*(wrong)*"
    if mark and len(answer) == 1:
        return [*lines, f"{answer[0]}  {mark}", ""]
    return [*lines, *answer, "", *([mark, ""] if mark else [])]


def _shown(text: str, *, always: bool = False) -> list[str]:
    """Markdown that shows a text literally, cut if it is long: one line as it is, several lines as a block.

    If ``always`` is set, one line becomes a block too.
    """
    cut = _cut(text.strip("\n"))
    return block(cut) if always or "\n" in cut else [literal(cut)]


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} …"


def _reinforcement(report: Report) -> list[str]:
    if not (curve := report.get("rl", {}).get("rl")):
        return []
    rewards = {"reward of the rollouts": curve["reward"], "reward on held-out problems": curve["heldout_reward"]}
    rows = [(name, f"{values[0]:.3f}", f"{values[-1]:.3f}") for name, values in rewards.items() if values]
    if curve["pass_at_k"]:
        before, after = curve["pass_at_k"]
        rows += [
            (f"pass@{k} on held-out problems", _or_dash(before.get(k), "{:.1%}"), f"{share:.1%}")
            for k, share in _by_k(after)
        ]
    return [*table(("", "first", "last"), rows), ""]


def _samples(report: Report) -> list[str]:
    lines: list[str] = []
    for prompt, continuation in report.get("samples", []):
        if "\n" in f"{prompt}{continuation}".strip():
            # A sample of several lines is shown as a block, because code and verse need their line breaks.
            lines += [f"From **{literal(prompt)}**:", "", *block(prompt + continuation), ""]
            continue
        space = " " if continuation[:1].isspace() else ""
        lines += [f"**{literal(prompt)}**{space}{literal(continuation)}", ""]
    return lines


def _training_samples(report: Report) -> list[str]:
    """Markdown of the samples that the model wrote at several steps of pretraining, one prompt after another."""
    points = report.get("base", {}).get("samples", [])  # A report of an earlier version has no samples.
    points = _spread(points, _SAMPLED_STEPS)
    written: dict[tuple[int, str], list[tuple[int, str]]] = {}
    for point in points:
        for number, (prompt, continuation) in enumerate(point["samples"]):
            written.setdefault((number, prompt), []).append((point["step"], continuation))
    lines: list[str] = []
    for (_, prompt), continuations in written.items():
        lines += [f"From **{literal(prompt)}**:", ""]
        for step, continuation in continuations:
            shown = _shown(continuation) if continuation.strip() else ["*(nothing)*"]
            label = f"*Step {step:,}:*"
            lines += [f"{label} {shown[0]}", ""] if len(shown) == 1 else [label, "", *shown, ""]
    return lines


def _spread(points: Sequence[Any], count: int) -> Sequence[Any]:
    """At most ``count`` of the points: the first, the last, and some evenly between them."""
    if len(points) <= count:
        return points
    return [points[i * (len(points) - 1) // (count - 1)] for i in range(count)]


def _learning(report: Report) -> list[str]:
    """Markdown of the answers to the same questions at several steps of all stages.

    It is empty for a report of an earlier version, because such a report has no answers.
    """
    snapshots = [
        (stage, point["step"], dict(point["answers"]))
        for stage, described in _stages_of(report).items()
        for point in described.get("answers", [])
    ]
    questions = dict.fromkeys(question for _, _, answers in snapshots for question in answers)
    lines: list[str] = []
    for question in questions:
        rows = [
            (f"{TITLES[stage]}, step {step:,}", literal(answers[question]) or "*(nothing)*")
            for stage, step, answers in _spread(snapshots, _ANSWERING_SNAPSHOTS)
            if question in answers
        ]
        lines += [f"**{literal(question)}**", "", *table(("snapshot", "answer"), rows), ""]
    return lines


def _inference(report: Report) -> list[str]:
    if not (benchmark := report["benchmark"]):
        return []
    rows = [
        (
            row["mix"],
            f"{row['slots']} at once" if row["slots"] is not None else f"{row['rate']:g}/s",
            f"{row['tokens_per_second']:,.0f}",
            _milliseconds(row["time_to_first_token"]),
            _milliseconds(row["inter_token_latency"]),
        )
        for row in benchmark["rows"]
    ]
    header = ("requests", "load", "tokens/s", "time to first token, p50 ms", "time between tokens, p50 ms")
    return [f"On {literal(_machine(benchmark['machine']))}.", "", *table(header, rows), ""]


def _milliseconds(times: list[float] | None) -> str:
    return f"{1000 * times[0]:,.1f}" if times else "—"


def _promotion(report: Report) -> list[str]:
    if not (promotion := report["promotion"]):
        return []
    against = f" Compared with {code(promotion['against'])}." if promotion["against"] else ""
    marks = {True: "holds", False: "**fails**", None: "does not apply"}
    rows = [(literal(rule["rule"]), marks[rule["passed"]], literal(rule["reason"])) for rule in promotion["rules"]]
    lines = [f"This model: {_verdict(promotion)}.{against}", ""]
    return [*lines, *table(("rule", "", "why"), rows), ""] if rows else lines


def _by_k(pass_at_k: Mapping[str, float]) -> list[tuple[str, float]]:
    """Pairs of k and pass@k, sorted by k as a number. (In JSON, k is text.)"""
    return sorted(pass_at_k.items(), key=lambda item: int(item[0]))


def _or_dash(value: Any, form: str) -> str:
    return "—" if value is None else form.format(value)


_SECTIONS: dict[str, Callable[[Report], list[str]]] = {
    "Training": _training,
    "Held-out conversations": _conversations,
    "CORE": _core,
    "Chat tasks": _chat_tasks,
    "Reinforcement learning": _reinforcement,
    "Promotion": _promotion,
    "Held-out text": _held_out_text,
    "Samples of the base model": _samples,
    "Samples during pretraining": _training_samples,
    "How it learned": _learning,
    "Tokenizer": _tokenizer,
    "Inference": _inference,
    "Configuration": _configuration,
}
