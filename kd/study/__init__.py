"""A study: a grid of teachers and students over several seeds, its controls, and contrasts declared before it ran.

``python -m kd.study recipe=studies/NAME`` fills a folder, ``<output>/studies/<name>/``, which everything else reads:

``study.json``, the card, rewritten at every start from the recipe and the command line::

    schema      1
    name, claim, paper, command
    engine      "population" (small networks, many at once) or "runs" (a kd.train run each)
    recipe      the base recipe, nested as `--cfg job` prints it, without `study`
    seeds       [0, 1, ...]; everything is paired by seed: members of one seed share weights at the start and batches
    axes        {axis: [value, ...]} of the grid. An axis is a setting ("loss.temperature") or a name of the study's
                own ("method"), whose values are then labels; `labels` has what each stands for
    labels      {axis: {label: {setting: value}}}
    cells       [{"axes": {axis: value}, "seed": 0, "point": id}], the grid. Two cells can be one point, as
                student_temperature=1 and null (the teacher's) are at temperature=1: nothing is trained twice
    controls    [{"control": "hard" | "smoothed" | "bayes", "axes": {axis: value}, "seed": 0, "point": id}]; only axes
                that make a difference to a network without a teacher are in `axes`
    contrasts   [{"name", "metric" (a column of the table), "a": SIDE, "b": SIDE, "minus": null or {"a", "b"}}] with
                SIDE = {"settings": {setting or axis: value}, "points": [id, ...]}, one point for each of `seeds`, in
                order. The contrast is a - b, paired by seed; with `minus` it is (a - b) - (minus.a - minus.b)
    points      [id, ...] of all teachers, students and controls, sorted
    data        {data hash: {"name", "class_names", "train", "val", "test" (sizes), "posterior": whether p* is known}}
    misleading  {metric: why}, of kd.metrics.METRICS
    provenance  kd.runtime.provenance of the process that wrote the card

``points/<id>.json``, one for each point, written once, atomically, when it is finished (or has failed)::

    schema      1
    id          12 hex digits: the content hash of role, settings and data; the same point of two studies has one id
    role        "teacher", "student" or "control"
    control     null, or "hard" (labels), "smoothed" (label smoothing), "bayes" (the true posterior as targets)
    state       "finished", or "failed" with `error`, one line, and no metrics; a failed one is tried again next time
    seed
    settings    {"teacher.label_smoothing": 0.4, ...}, every setting that decides the point, flat. In `loss`,
                student_temperature null means the same as temperature
    teacher     id of the teacher's point; null for teachers and controls
    metrics     {"train": {...}, "val": {...}, "test": {...}}, last weights, on views without augmentation. A value is a
                number, or null where it does not exist. Names are those of kd.metrics; see kd.study.measure
    detail      what is no single number, for figures: see kd.study.measure
    provenance  kd.runtime.provenance with data_hash, engine, seconds (this point's share), job

``table.csv``: one row for each of the card's points, finished or failed, sorted; no times in it, so that a study that
was killed and resumed gives the same bytes. Columns: point, role, control, state, error, seed, teacher_point; one for
each setting that differs between points and some that never fail to interest (`kd.study.table.ALWAYS`); one for each
axis of the study's own; one for each metric as ``split.name``; ``test.transfer_efficiency``, which needs both controls
of its seed; for students the teacher's own metrics as ``teacher.split.name``. Text that a spreadsheet would compute,
which begins with = + - @ or a tab and is no number, has a ' before it.

`load` and the report check every entry: the first that is not as described here is a ConfigError that names the file
and the entry. No malformed point is left out in silence.

``teachers/<id>.safetensors``: the weights of each teacher. ``jobs/``: what the launcher was given. ``runs/``: the
folders of kd.train where that is the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kd.study.table import load

__all__ = ["load"]


def __getattr__(name: str):
    if name == "load":  # pandas is imported when it is wanted
        from kd.study.table import load

        return load
    raise AttributeError(f"module 'kd.study' has no attribute {name!r}")
