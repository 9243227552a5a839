"""Losses on a student's outputs, a teacher's outputs and labels. All are modules: ``DKD()(student, teacher, target)``.

Symbols in the methods' docstrings: N examples, K classes, C channels, H and W height and width, D features; s and t the
student's and the teacher's logits or features, y the label, T the temperature, p_T(z) = softmax(z / T), p = softmax(s).
A method has one value for each example unless its docstring says one for the batch; ``reduction`` is as in DistillLoss.

- ``DistillLoss``: label-smoothed cross entropy plus distillation (Hinton et al. 2015), fused
- ``DistillTerms``: what ``DistillLoss.terms`` returns
- ``LinearDistillLoss``: the same on the logits of a linear head, without holding them
- ``distill_loss``: ``DistillLoss`` as a function
- ``View``: logits, maps, embedding and classifier of one network, for methods that need several of these

Logits of one example, called on ``(student_logits, teacher_logits)``:

- ``KD``: knowledge distillation (Hinton et al. 2015)
- ``ReverseKL``: KL(student || teacher), where KD has KL(teacher || student) (Gu et al. 2024)
- ``GeneralizedJSD``: generalised Jensen-Shannon divergence (Agarwal et al. 2024)
- ``LogitMSE``: regression on logits (Kim et al. 2021)
- ``HardDistillation``: cross entropy with the teacher's most likely class (Touvron et al. 2021)
- ``SmoothedTeacher``: KD from a teacher smoothed by formula
- ``TTM``: transformed teacher matching (Zheng & Yang 2024)
- ``WTTM``: the same, each example weighted by its teacher's uncertainty (Zheng & Yang 2024)
- ``TfSelf``: Tf-KD self-training (Yuan et al. 2020)
- ``LogitStandardKD``: any method of logits, on standardized logits (Sun et al. 2024)
- ``CTKD``: KD at a learned temperature (Li et al. 2023)

Logits and the label, called on ``(student_logits, teacher_logits, target)``:

- ``WSL``: weighted soft labels (Zhou et al. 2021)
- ``ATS``: asymmetric temperature scaling (Li et al. 2022)
- ``DKD``: decoupled distillation (Zhao et al. 2022)
- ``NKD``: normalised distillation (Yang et al. 2023)
- ``RLD``: refined logits (Sun et al. 2024)

Logits of a whole batch, called on ``(student_logits, teacher_logits)``:

- ``DIST``: correlation of rows and columns (Huang et al. 2022)
- ``MLKD``: multi-level logit distillation (Jin et al. 2023)

Without a teacher, called on ``(student_logits, target)``:

- ``LabelSmoothing``: label smoothing, both conventions (Szegedy et al. 2016)
- ``GeneralizedSmoothing``: smoothing with a mass that may be negative (Wei et al. 2022)
- ``OnlineLabelSmoothing``: soft labels from the last epoch's predictions (Zhang et al. 2021)
- ``MaxSup``: max suppression (Zhou et al. 2025)
- ``ConfidencePenalty``: a penalty on confident predictions (Pereyra et al. 2017)
- ``Focal``: focal loss (Lin et al. 2017)
- ``FLSD53``: focal loss with a sample-dependent exponent (Mukhoti et al. 2020)
- ``TfReg``: Tf-KD regularisation (Yuan et al. 2020)
- ``DML``: deep mutual learning (Zhang et al. 2018)

Feature maps, called on ``(student_maps, teacher_maps)``:

- ``Hint``: FitNets hint (Romero et al. 2015)
- ``AT``: attention transfer (Zagoruyko & Komodakis 2017)
- ``VID``: variational information distillation (Ahn et al. 2019)
- ``NST``: neuron selectivity transfer (Huang & Wang 2017)
- ``FSP``: flow of solution procedure (Yim et al. 2017)
- ``SP``: similarity-preserving distillation (Tung & Mori 2019)
- ``OFD``: overhaul of feature distillation (Heo et al. 2019)

Embeddings, called on ``(student_embedding, teacher_embedding)``:

- ``PKT``: probabilistic knowledge transfer (Passalis & Tefas 2018)
- ``RKD``: relational distillation (Park et al. 2019)
- ``CC``: correlation congruence (Peng et al. 2019)
- ``CRD``: contrastive representation distillation (Tian et al. 2020)

Several of these, called on ``(View(...), View(...))``:

- ``ReviewKD``: knowledge review (Chen et al. 2021)
- ``SimKD``: the teacher's classifier, reused (Chen et al. 2022)

``reference`` defines DistillLoss in plain PyTorch; ``kernels`` has it fused, for CPUs and GPUs. ``settings``,
``ranges`` and ``inputs`` check settings and tensors. Names load on first use: ``ranges`` and the names of the methods
are read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from kd.losses.methods.registry import classes

if TYPE_CHECKING:  # where names cannot be read from files
    from kd.losses.distill import DistillLoss, DistillTerms, distill_loss
    from kd.losses.linear import LinearDistillLoss
    from kd.losses.methods.batch_logits import *
    from kd.losses.methods.connectors import *
    from kd.losses.methods.contrastive import *
    from kd.losses.methods.decoupled import *
    from kd.losses.methods.features import *
    from kd.losses.methods.labels import *
    from kd.losses.methods.logits import *
    from kd.losses.methods.relations import *
    from kd.losses.methods.seen import View
    from kd.losses.methods.teacher_free import *
    from kd.losses.methods.temperature import *

# The module of every public name.
_HOME = classes() | {
    "DistillLoss": "kd.losses.distill",
    "DistillTerms": "kd.losses.distill",
    "distill_loss": "kd.losses.distill",
    "LinearDistillLoss": "kd.losses.linear",
    "View": "kd.losses.methods.seen",
}

__all__ = [*_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'kd.losses' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__():
    return sorted([*globals(), *__all__])
