"""Studies: a grid of teachers and students over several seeds, its controls, and contrasts declared before it runs.

``python -m kd.study recipe=studies/NAME`` fills a directory, ``<output>/studies/<name>/``, from which everything else
reads. In Python, `kd.study.load(directory)` returns its table as a DataFrame.

``study.json`` describes the study; every start rewrites it from the recipe and the command line::

    schema      1
    name, claim, paper, command
    engine      "population" (small networks, many as one batched model), "runs" (a kd.train run each), or both
    recipe      the base recipe, nested as `--cfg job` prints it, without `study`
    seeds       [0, 1, ...]; everything is paired by seed: the networks of one seed share initial weights and batches
    axes        {axis: [value, ...]} of the grid. An axis is a setting ("loss.temperature") or a name of the study's
                own ("method"), whose values are labels; `labels` says what each label stands for
    labels      {axis: {label: {setting: value}}}
    cells       [{"axes": {axis: value}, "seed": 0, "point": id}], the grid. Two cells can be one point: at
                temperature=1, student_temperature=1 and null (the teacher's) are the same, and trained once
    controls    [{"control": "hard" | "smoothed" | "bayes", "axes": {axis: value}, "seed": 0, "point": id}]; `axes` has
                only those that change a network without a teacher
    contrasts   [{"name", "metric" (a column of the table), "a": SIDE, "b": SIDE, "minus": null or {"a", "b"}}] with
                SIDE = {"settings": {setting or axis: value}, "points": [id, ...]}, one point for each of `seeds`, in
                order. The contrast is a - b, paired by seed; with `minus` it is (a - b) - (minus.a - minus.b)
    points      [id, ...] of all teachers, students and controls, sorted
    data        {data hash: {"name", "class_names", "train", "val", "test" (sizes), "posterior": whether p* is known}}
    misleading  {metric: why}, of kd.metrics.METRICS
    provenance  kd.runtime.provenance of the process that wrote it

``points/<id>.json`` is one network, written once, atomically, when its training has finished or failed::

    schema      1
    id          12 hex digits: the content hash of role, settings and data; the same network has one id in every study
    role        "teacher", "student" or "control"
    control     null, or "hard" (labels), "smoothed" (label smoothing), "bayes" (the true posterior as targets)
    state       "finished", or "failed" with `error`, one line, and no metrics; the next start tries it again
    seed
    settings    {"teacher.label_smoothing": 0.4, ...}, every setting that decides the network, by dotted name. In
                `loss`, student_temperature null means the same as temperature
    teacher     id of the teacher's point; null for teachers and controls
    metrics     {"train": {...}, "val": {...}, "test": {...}}, of the last weights on images without augmentation. A
                value is a number, or null where the metric is undefined. Names are those of kd.metrics.METRICS
    detail      data of figures: see kd.study.measure
    provenance  kd.runtime.provenance with data_hash, engine, seconds (this point's share), job

``table.csv`` has one row for each point of study.json, sorted, without times, so that a study that was killed and
resumed gives the same bytes. Columns: point, role, control, state, error, seed, teacher_point; one for each setting
that differs between points and those of `kd.study.table.ALWAYS`; one for each axis of the study's own; one for each
metric as ``split.name``; ``test.transfer_efficiency``, which needs both controls of its seed; and for students their
teacher's metrics as ``teacher.split.name``.

``teachers/<id>.safetensors``: the weights of each teacher. ``jobs/``: what the launcher was given. ``runs/``: the run
directories of kd.train, for points of the engine `runs`.

A study of a kd with another schema is refused in one line that says what to do.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kd.study.table import load

__all__ = ["load"]


def __getattr__(name: str):
    if name == "load":  # pandas and torch load when it is asked for
        from kd.study.table import load

        return load
    raise AttributeError(f"module 'kd.study' has no attribute {name!r}")
