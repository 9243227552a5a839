"""Methods as losses: the call on tensors, its reductions, what is made lazily, and what wrong calls say."""

import doctest
import inspect
import pickle
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from method_batches import draw, labels
from torch.export import Dim

import kd.losses
from kd.losses import (
    AT,
    CC,
    CRD,
    CTKD,
    DIST,
    DKD,
    DML,
    KD,
    MLKD,
    NKD,
    OFD,
    RKD,
    WSL,
    DistillLoss,
    Focal,
    Hint,
    LabelSmoothing,
    LinearDistillLoss,
    LogitStandardKD,
    MaxSup,
    OnlineLabelSmoothing,
    ReviewKD,
    SimKD,
    TfReg,
    View,
)
from kd.losses.methods.base import Seen
from kd.losses.methods.registry import library, names

METHODS = {method.__name__: method for method in (library()[name] for name in names())}


@pytest.fixture
def logits():
    """A student's, which take gradients, a teacher's, and labels."""
    return draw(6, 5, scale=3.0).requires_grad_(), draw(6, 5, seed=1, scale=3.0), labels()


# ---- names


def test_every_method_is_a_public_name_with_a_line_of_its_own():
    lines = re.findall(r"^- ``(\w+)``: \S", kd.losses.__doc__, re.MULTILINE)
    others = {"DistillLoss", "DistillTerms", "LinearDistillLoss", "View", "distill_loss"}
    assert sorted(lines) == sorted(kd.losses.__all__)
    assert set(kd.losses.__all__) == METHODS.keys() | others
    assert all(getattr(kd.losses, name) is method for name, method in METHODS.items())


def test_help_of_the_package_shows_settings_in_words():
    assert kd.losses is sys.modules["kd.losses"]
    run = [sys.executable, "-c", "import kd; kd.losses.DKD; help(kd.losses.DKD)"]
    shown = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert "a number from 0.001 to 1000" in shown
    assert "<function" not in shown


def test_names_load_without_torch_until_one_is_asked_for():
    code = "import sys, kd.losses; a = 'torch' in sys.modules; kd.losses.RKD; print(a, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_example_of_the_docstring_runs(name):
    known = {"torch": torch, **{each: getattr(kd.losses, each) for each in kd.losses.__all__}}
    test = doctest.DocTestParser().get_doctest(METHODS[name].__doc__, known, name, None, 0)
    assert test.examples
    said = []
    assert doctest.DocTestRunner(verbose=False).run(test, out=said.append).failed == 0, "".join(said)


# ---- the call


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 3, 2)])
def test_kd_and_label_smoothing_are_distill_loss(reduction, shape):
    s, t, y = draw(*shape, 5).requires_grad_(), draw(*shape, 5, seed=1), torch.randint(5, shape)
    if y.ndim:
        y.view(-1)[1] = -100
    for ours, settings in ((KD(3.0, reduction=reduction), {"kd_weight": 1, "ce_weight": 0}),
                           (LabelSmoothing(0.2, reduction=reduction), {"kd_weight": 0, "ce_weight": 1})):  # fmt: skip
        theirs = DistillLoss(3.0, label_smoothing=0.2, reduction=reduction, **settings)(s, t, y)
        value = ours(s, t, y)
        torch.testing.assert_close(value, theirs, rtol=1e-12, atol=1e-12)
        slopes = (torch.autograd.grad(x.sum(), s, retain_graph=True)[0] for x in (value, theirs))
        torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)


def test_a_value_of_a_whole_batch_counts_once_for_every_example(logits):
    s, t, _ = logits
    for method in (DIST, MLKD, lambda **more: LogitStandardKD("dist", **more)):
        torch.testing.assert_close(method(reduction="sum")(s, t), 6 * method()(s, t))
        torch.testing.assert_close(method()(s.view(2, 3, 5), t.view(2, 3, 5)), method()(s, t))
        with pytest.raises(ValueError, match=r"has one value: reduction must be mean or sum$"):
            method(reduction="none")(s, t)


def test_the_target_may_be_missing_where_the_formula_has_none(logits):
    s, t, y = logits
    for method in (KD(), DIST(), LogitStandardKD(), CTKD()):
        torch.testing.assert_close(method(s, t), method(s, t, y))
    torch.testing.assert_close(MaxSup()(s), MaxSup()(s, y))
    for method in (DKD(), NKD(), WSL(), LogitStandardKD("dkd")):
        with pytest.raises(ValueError, match=r"needs the target; type loss\(student_logits, teacher_logits, target\)"):
            method(s, t)
    for method in (Focal(), TfReg(), LabelSmoothing()):
        with pytest.raises(ValueError, match=r"needs the target; type loss\(student_logits, target\)"):
            method(s)
    soft = F.one_hot(y, 5).double()
    torch.testing.assert_close(WSL()(s, t, soft), WSL()(s, t, y))


def test_a_method_without_a_teacher_ignores_one(logits):
    s, t, y = logits
    for method in (Focal(), MaxSup(), TfReg(), OnlineLabelSmoothing()):
        torch.testing.assert_close(method(s, t, y), method(s, y))


def test_features_are_called_by_their_natural_inputs():
    s, t = draw(4, 6, 3, 3), draw(4, 6, 3, 3, seed=1)
    torch.testing.assert_close(AT()(s, t), AT()([s], [t]))
    torch.testing.assert_close(AT()([s, s], [t, t]), 2 * AT()(s, t))
    torch.testing.assert_close(AT()(View(maps=[s]), View(maps=[t])), AT()(s, t))
    each = AT(reduction="none")(s, t, torch.tensor([0, -100, 3, 1]))
    assert each[1] == 0
    torch.testing.assert_close(AT()(s, t, torch.tensor([0, -100, 3, 1])), each.sum() / 3)
    a, b = draw(4, 6), draw(4, 9)
    torch.testing.assert_close(RKD()(a, b), RKD()(View(embedding=a), View(embedding=b)))
    view = View(maps=[s], embedding=draw(4, 7))
    assert ReviewKD()(view, view).ndim == 0


# ---- what is made at the first call


def test_modules_are_made_at_the_first_call_wherever_the_default_device_is():
    s, t = draw(4, 6, 3, 3).float(), draw(4, 2, 3, 3, seed=1).float()
    torch.manual_seed(0)
    method = Hint(layer=0)
    value = method(s, t)
    assert [p.shape for p in method.parameters()] == [(2, 6, 1, 1), (2,)]
    assert torch.equal(method(s, t), value)
    torch.manual_seed(0)
    torch.set_default_device("meta")
    try:
        assert torch.equal(Hint(layer=0)(s, t), value)
        assert RKD()(s.flatten(1), t.flatten(1)).device.type == "cpu"
    finally:
        torch.set_default_device(None)


def test_parameters_of_what_is_not_built_say_what_to_call():
    says = r"^hint: is not built yet .*; call loss\(student_features, teacher_features\) once, or loss.build\(seen\)"
    for ask in (lambda m: m.regressor, lambda m: m.named_parameters(), lambda m: torch.optim.SGD(m.parameters())):
        with pytest.raises(RuntimeError, match=says):
            ask(Hint())
    with pytest.raises(AttributeError, match="has no attribute 'regressor'"):
        _ = KD().regressor
    for unbuilt in (
        lambda: SimKD().classify(View(draw(2, 3))),
        lambda: OnlineLabelSmoothing().end_epoch(),
        lambda: CTKD().temperature(),
    ):
        with pytest.raises(RuntimeError, match="is not built yet"):
            unbuilt()
    for nothing in (KD(), CC(), LogitStandardKD("dkd")):
        assert list(nothing.parameters()) == []
    for learns in (CC(released=True), LogitStandardKD("ctkd")):
        with pytest.raises(RuntimeError, match="is not built yet"):
            list(learns.parameters())


def test_what_is_not_built_has_no_attribute_for_hasattr_which_initialisers_ask():
    parent = torch.nn.ModuleList([Hint(layer=0)])
    asked = []
    parent.apply(lambda module: asked.append(hasattr(module, "weight")))
    assert asked == [False, False]


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_loaded_before_the_first_call_says_what_to_call(strict):
    saved = torch.nn.ModuleDict({"hint": Hint(layer=0)})
    saved["hint"](MAP, MAP)
    loaded = torch.nn.ModuleDict({"hint": Hint(layer=0)})
    loaded.load_state_dict({}, strict=strict)
    says = r"hint: is not built yet .*; call loss\(student_features, teacher_features\) once"
    with pytest.raises(RuntimeError, match=says):
        loaded.load_state_dict(saved.state_dict(), strict=strict)
    loaded["hint"](MAP, MAP)
    loaded.load_state_dict(saved.state_dict(), strict=strict)
    assert torch.equal(loaded["hint"](MAP, MAP), saved["hint"](MAP, MAP))


def test_what_a_first_call_in_inference_mode_made_can_be_trained():
    method = OFD()
    with torch.inference_mode():
        method(MAP * 1, MAP * 1)
    method(MAP, MAP).backward()
    assert all(parameter.grad is not None for parameter in method.parameters())


def test_a_reused_classifier_is_the_teachers_alone():
    weight = draw(5, 3)
    teacher = View(MAP.mean((2, 3)) @ weight.T, [MAP], weight=weight)
    assert SimKD()(View(maps=[MAP]), teacher).isfinite()
    with pytest.raises(ValueError, match="simkd: needs the weight of the teacher"):
        SimKD()(teacher, View(maps=[MAP]))


def test_what_learns_is_trained_by_a_loop_of_ones_own(logits):
    s, t, y = logits
    method = DML()
    peer = torch.nn.Linear(4, 5)
    method(s, y, images=draw(6, 4), peer=peer)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    before = peer.weight.detach().clone()
    method(s, y, images=draw(6, 4)).backward()
    optimizer.step()
    assert not torch.equal(peer.weight, before)
    contrast = CRD(num_negatives=8, embed_dim=4)
    index = torch.arange(6)
    first = contrast(s, t, y, index=index, num_samples=20)
    assert first.isfinite()
    assert contrast(s, t, y, index=index) != first  # the memory has moved
    assert contrast.memory_student.dtype == torch.float64


def test_a_method_is_pickled_and_printed(logits):
    s, t, y = logits
    method = pickle.loads(pickle.dumps(DKD(temperature=2.0, reduction="sum")))
    assert repr(method) == "DKD(reduction='sum', temperature=2.0)"
    assert torch.equal(method(s, t, y), DKD(temperature=2.0, reduction="sum")(s, t, y))


# ---- modes of PyTorch

OF_LOGITS = [n for n, m in METHODS.items() if m.needs <= {"teacher", "target", "labels", "batch"}]


def given(method, s, t, y):
    return (s, t, y) if "teacher" in method.needs else (s, y)


@pytest.mark.parametrize("name", OF_LOGITS)
def test_values_and_gradients_are_the_same_when_compiled_and_under_torch_func(name, logits):
    s, t, y = logits
    method = METHODS[name]().eval()
    value = method(*given(method, s, t, y))  # what it keeps is made
    (slope,) = torch.autograd.grad(value, s)
    torch._dynamo.reset()
    compiled = torch.compile(method, fullgraph=True, backend="eager")(*given(method, s, t, y))
    torch.testing.assert_close(compiled, value)
    torch.testing.assert_close(torch.autograd.grad(compiled, s)[0], slope)
    torch.testing.assert_close(torch.func.grad(lambda z: method(*given(method, z, t, y)))(s.detach()), slope)
    many = torch.func.vmap(lambda z: method(*given(method, z, t, y)))(s.detach().expand(2, 6, 5))
    torch.testing.assert_close(many, value.detach().expand(2))


@pytest.mark.parametrize("name", OF_LOGITS)
def test_a_label_of_no_class_is_nan_where_labels_are_not_read(name, logits):
    s, t, _ = logits
    y = torch.tensor([0, 1, -1, 255, -100, 2])
    method = METHODS[name]().eval()
    method(*given(method, s, t, y.clamp(0, 4)))
    whole = "batch" in method.needs
    method.reduction = "mean" if whole else "none"
    torch._dynamo.reset()
    value = torch.compile(method, fullgraph=True, backend="eager")(*given(method, s, t, y))
    spoilt = value.isnan().expand(6).tolist()
    assert spoilt == ([True] * 6 if whole else [False, False, True, True, False, False])
    assert torch.autograd.grad(value.sum(), s)[0].isnan().any(1).tolist() == spoilt


@pytest.mark.parametrize("name", OF_LOGITS)
def test_an_exported_method_takes_any_number_of_rows(name, logits):
    method, rows = METHODS[name]().eval(), Dim("rows")
    few = given(method, *(x.detach() for x in logits))
    many = [torch.cat([x, x.flip(0), x]) for x in few]
    value = method(*many)  # what it keeps is made
    program = torch.export.export(method, few, dynamic_shapes=[{0: rows}] * len(few)).module()
    torch.testing.assert_close(program(*many), value)


# ---- wrong calls

S, T, Y = draw(6, 5), draw(6, 5, seed=1), labels()
SEEN = Seen(View(S), View(T), Y)
MAP = draw(4, 3, 2, 2)
CALL = "type loss(student_logits, teacher_logits, target)"
WRONG = {
    f"TypeError: dkd: the teacher's place has int64 labels: must be floating; {CALL}": lambda: DKD()(S, Y),
    f"TypeError: dkd: settings go to the constructor and tensors to the call: {CALL.replace('loss', 'DKD(...)')}": (
        lambda: DKD(S, T, Y)
    ),
    "TypeError: kd: settings go to the constructor": lambda: KD(S, T, Y),
    f"TypeError: dkd: a call takes tensors: {CALL}, or loss.evaluate(seen)": lambda: DKD()(SEEN),
    "ValueError: kd: needs the teacher; type loss(student_logits, teacher_logits)": lambda: KD()(S),
    "ValueError: teacher_logits.requires_grad=True: must be False; use torch.no_grad() or teacher_logits.detach()": (
        lambda: KD()(S, T.clone().requires_grad_())
    ),
    "ValueError: teacher.maps[0].requires_grad=True: must be False; use torch.no_grad() or teacher.maps[0].detach()": (
        lambda: AT()(MAP, MAP.clone().requires_grad_())
    ),
    "ValueError: teacher_logits has shape (6, 4): must be (6, 5)": lambda: KD()(S, T[:, :4]),
    "ValueError: target has shape (5,): must be (6,)": lambda: DKD()(S, T, Y[:5]),
    "ValueError: student has 1 maps and teacher 2": lambda: AT()(MAP, [MAP, MAP]),
    "ValueError: teacher.maps[0] has shape (2, 3, 2, 2): must be (4, 3, 2, 2)": lambda: AT()(MAP, MAP[:2]),
    "TypeError: student_features: must be a floating tensor (N, C, H, W) or a list of them, got dict_values": (
        lambda: AT()({"layer4": MAP}.values(), MAP)
    ),
    "TypeError: View(maps=tensor): must be a list of maps; type View(maps=[tensor])": lambda: View(maps=MAP),
    "ValueError: at: student_features of shape (6, 5): must be (N, C, H, W)": lambda: AT()(S, T),
    "TypeError: reviewkd: needs embedding and maps of each network; type loss(View(maps=..., embedding=...), View(": (
        lambda: ReviewKD()(MAP, MAP)
    ),
    "ValueError: crd: needs the index; type loss(student_features, teacher_features, target, index=index, ": (
        lambda: CRD()(S, T, Y)
    ),
    "ValueError: kd.reduction='batchmean': must be one of mean, sum, none": lambda: KD(reduction="batchmean"),
    "TypeError: DistillLoss: settings go to the constructor and tensors to the call: type DistillLoss(...)(student_": (
        lambda: DistillLoss(S, T, Y)
    ),
    "TypeError: LinearDistillLoss: settings go to the constructor and tensors to the call: type LinearDistillLoss(": (
        lambda: LinearDistillLoss(S, T, Y)
    ),
    "ValueError: lskd: method='at': must be a method of logits": lambda: LogitStandardKD("at"),
}  # fmt: skip


@pytest.mark.parametrize("says", WRONG)
def test_a_wrong_call_says_what_to_type(says):
    with pytest.raises((TypeError, ValueError)) as error:
        WRONG[says]()
    assert f"{type(error.value).__name__}: {error.value}".startswith(says)
    assert "\n" not in str(error.value)


def test_the_class_of_every_method_has_a_plain_constructor():
    """Its fields, and `reduction` by keyword alone."""
    for method in METHODS.values():
        last = list(inspect.signature(method).parameters.values())[-1]
        assert (last.name, last.kind) == ("reduction", inspect.Parameter.KEYWORD_ONLY)
