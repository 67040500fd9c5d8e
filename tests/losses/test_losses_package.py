"""What importing opd.losses costs, and that its signatures tell the truth about shapes."""

import ast
import itertools
import pathlib
import subprocess
import sys

import opd.losses

PACKAGE = pathlib.Path(opd.losses.__file__).parent


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_importing_and_using_the_losses_needs_torch_alone():
    others = (
        "jaxtyping",
        "beartype",
        "transformers",
        "numpy",
        "pydantic",
        "tyro",
        "rich",
        "yaml",
        "safetensors",
    )
    found = run(
        f"""
import sys
for name in {others}:
    sys.modules[name] = None
import torch, opd.losses as L
from opd.types import DenseTarget
logits = torch.zeros(2, 5, requires_grad=True)
out = L.Objective(support="union", top_k=2).per_token(logits, DenseTarget(logits=torch.eye(2, 5)), torch.tensor([0, 1]))
out.loss.sum().backward()
assert logits.grad.isfinite().all()
assert L._shapes.Float[torch.Tensor, "tokens"] is torch.Tensor
print("done")
"""
    )
    assert found.stdout.strip() == "done", found.stderr


CHECKED = """
import torch
from jaxtyping import install_import_hook
with install_import_hook("opd.losses", "beartype.beartype"):
    import opd.losses as L
    assert all(hasattr(L, name) for name in L.__all__)  # names are imported on first use
from opd.types import DenseTarget, Head, HiddenTarget, SampledTarget, TopKTarget
logits, ids = torch.randn(3, 8), torch.tensor([0, 1, 2])
"""


def test_every_public_function_honours_its_declared_shapes():
    found = run(
        CHECKED
        + """
s, t = L.to_logp(logits), L.to_logp(torch.randn(3, 8))
for name in ("forward_kl", "reverse_kl", "generalized_jsd", "skew_reverse_kl", "skew_forward_kl", "total_variation",
             "alpha_beta_divergence"):
    getattr(L, name)(s, t)
    getattr(L, name)(s.reshape(1, 3, 8), t.reshape(1, 3, 8))
L.entropy(s)
support = L.union_support(s, t, 2, (1,))
for tail in ("bucket", "generalized", "renormalize"):
    L.partial_divergence("reverse_kl", support.gather(s), support.gather(t), tail=tail)
dense = DenseTarget(logits=t)
best = t.topk(4)
top = TopKTarget(ids=best.indices, teacher_logp=best.values, sampled_logp=L.gather_logp(t, ids))
hidden = HiddenTarget(hidden=torch.randn(3, 4), head=Head(weight=torch.randn(8, 4), bias=torch.randn(8), valid_vocab=7))
index = torch.tensor([0, 0, 1])
policy = dict(support="sampled", estimator="k1", delivery="advantage")
L.Objective().per_token(logits, dense, ids)
L.Objective(teacher_logp_floor=-20.0).per_token(logits[:, :8], hidden, ids)
L.Objective(support="teacher_top_k", top_k=3, tail="sampled").per_token(logits, top, ids, sampler_logp=s[:, 0])
L.Objective(**policy, discount=0.5, baseline="value").per_token(logits, top, ids, sequence_index=index)
L.Objective(**policy).per_token(logits, SampledTarget(teacher_logp=t[:, 0]), ids)
L.Objective().check_supplies(["dense"], "local")
L.mix_teachers([s, t], torch.tensor([0.5, 0.5]), "logit")
L.mix_teachers([s, t], torch.tensor([0.5, 0.5]).expand(3, 2))
L.mix_losses([s[:, 0], t[:, 0]], torch.tensor([0.5, 0.5]))
L.route([s, t], torch.tensor([0, 1, 0]))
rewards = L.group_relative_advantage(torch.tensor([0.0, 1.0]), torch.tensor([0, 0]))
L.combine_advantages(s[:, 0], t[:, 0], rl_weight=1.0, distill_weight=1.0, scale="match")
L.weighted_sum(s[:, 0], L.token_weights(index, torch.tensor([2, 1]), reduction="sequence_mean", global_count=2))
L.policy_gradient_loss(s[:, 0], t[:, 0], s[:, 0], 0.2)
print("done")
"""
    )
    assert found.stdout.strip() == "done", found.stderr


def test_a_wrong_shape_is_caught_when_shapes_are_checked():
    found = run(
        CHECKED
        + """
from jaxtyping import TypeCheckError
for call in (
    lambda: L.reverse_kl(L.to_logp(logits), L.to_logp(logits[:, :-1])),
    lambda: L.weighted_sum(torch.zeros(3), torch.zeros(4)),
    lambda: L.k1(torch.zeros(3), torch.zeros(3, 1)),
    lambda: L.Objective().per_token(logits, DenseTarget(logits=logits), torch.zeros(3)),
    lambda: L.top_k_support(torch.zeros(8), 2),
):
    try:
        call()
    except TypeCheckError:
        print("caught")
"""
    )
    assert found.stdout.split() == ["caught"] * 5, found.stderr


def test_every_public_name_is_exported_once_and_documented():
    assert len(set(opd.losses.__all__)) == len(opd.losses.__all__)
    for name in opd.losses.__all__:
        value = getattr(opd.losses, name)
        if callable(value) and getattr(value, "__module__", "").startswith("opd"):
            assert value.__doc__, name


def test_every_setting_of_the_objective_is_documented_under_its_field():
    tree = ast.parse((PACKAGE / "settings.py").read_text())
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ObjectiveSettings")
    for field, after in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), ast.unparse(field)
