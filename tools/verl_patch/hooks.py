"""The lines that the patch adds to verl's own files: where, and what. The anchors hold in verl 0.8.0, 0.9.0 and 0.9.1."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Insertion:
    """Lines that one of verl's files gains at one place."""

    file: str
    anchor: str
    """Text that stands in the file exactly once, whole lines."""
    lines: str
    before: bool = False
    """Put the lines before the anchor, not after it."""
    why: str


INSERTIONS = (
    Insertion(
        file="verl/trainer/ppo/core_algos.py",
        anchor="    loss_name = name\n    if loss_name not in POLICY_LOSS_REGISTRY:\n",
        before=True,
        lines="""\
    if name == "on_policy_distillation":
        import verl.trainer.ppo.on_policy_distillation  # noqa: F401  # registers the loss

""",
        why="the registered name loads the module that registers it",
    ),
    Insertion(
        file="verl/workers/config/actor.py",
        anchor='    loss_mode: str = "vanilla"\n',
        lines="""\
    # Of loss_mode "on_policy_distillation": the concept's names, and the keys of a recipe (ON_POLICY_DISTILLATION.md)
    distillation_type: Optional[str] = None
    distillation_temperature: Optional[float] = None
    distillation_beta: Optional[float] = None
    hybrid_lambda_rl: Optional[float] = None
    hybrid_lambda_distill: Optional[float] = None
    opd: Optional[dict] = None
""",
        why="verl's own dataclass holds the keys",
    ),
    Insertion(
        file="verl/workers/config/actor.py",
        anchor="        valid_loss_agg_modes = [\n",
        before=True,
        lines="""\
        if self.policy_loss.get("loss_mode", "vanilla") == "on_policy_distillation":
            from verl.trainer.ppo.opd_core.policy_loss_config import check_config

            check_config(self)

""",
        why="a config that cannot work is refused on the driver, before workers start",
    ),
    Insertion(
        file="verl/trainer/config/actor/actor.yaml",
        anchor='  loss_mode: "vanilla"\n',
        lines="""\

  # On-policy distillation (loss_mode: on_policy_distillation); null is the default, see ON_POLICY_DISTILLATION.md
  opd:
    # The frozen teacher: folder or hub name; or several, {NAME: {model: PATH}, ...}
    teacher: {model: null, offload: null, trust_remote_code: null}
    teachers: null

    # Of several teachers: probability / logit / loss, and {NAME: WEIGHT, ...} with a sum of 1
    mixture: {kind: null, weights: null}

    # reverse_kl / forward_kl / generalized_jsd / skew_reverse_kl; beta is the teacher's share in the mixture of the last two
    objective: {divergence: null, beta: null, normalize: null, student_temperature: null, teacher_temperature: null}

    # Weights of the policy loss hybrid_loss_mode and of the distillation loss
    rl: {weight: null, distill_weight: null}
    hybrid_loss_mode: null

    # Folder for token ids and losses of every micro-batch
    trace: null

  # Other names of objective.divergence (gkd is skew_reverse_kl), of both temperatures, objective.beta, rl.weight and rl.distill_weight
  distillation_type: null
  distillation_temperature: null
  distillation_beta: null
  hybrid_lambda_rl: null
  hybrid_lambda_distill: null
""",
        why="Hydra knows the keys and their defaults",
    ),
    Insertion(
        file="verl/workers/engine_workers.py",
        anchor="            self.actor.reset()\n",
        lines="""\
            if actor_config.policy_loss.get("loss_mode", "vanilla") == "on_policy_distillation":
                from verl.trainer.ppo.opd_core.step import OnPolicyDistillation

                self.loss_fn = OnPolicyDistillation(config=actor_config, engine=self.actor.engine)
""",
        why="the actor's loss function is ours, and the teachers are loaded beside the student",
    ),
    Insertion(
        file="verl/workers/engine/fsdp/transformer_impl.py",
        anchor="        model_inputs, output_args = self.prepare_model_inputs(micro_batch=micro_batch)\n",
        lines="""\
        if not forward_only and hasattr(loss_function, "look"):
            loss_function.look(micro_batch, model_inputs)  # on-policy distillation: the teacher reads what the student reads
""",
        why="teacher logits of the same tokens, and verl's own hook for student logits switched on",
    ),
)
