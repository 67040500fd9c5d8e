"""The lines that the patch adds to verl's own files: where, and what. The anchors hold in verl 0.8.0, 0.9.0 and 0.9.1."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Hook:
    """One insertion."""

    file: str
    anchor: str
    """Text that stands in the file exactly once, whole lines."""
    lines: str
    before: bool = False
    """Whether the lines go before the anchor, not after it."""
    why: str


HOOKS = (
    Hook(
        file="verl/trainer/ppo/core_algos.py",
        anchor="    loss_name = name\n    if loss_name not in POLICY_LOSS_REGISTRY:\n",
        before=True,
        lines="""\
    if name == "on_policy_distillation":
        import verl.trainer.ppo.on_policy_distillation  # noqa: F401  # registers the loss

""",
        why="the registered name loads the module that registers it",
    ),
    Hook(
        file="verl/workers/config/actor.py",
        anchor="        ppo_kl_coef (float): KL divergence penalty coefficient.\n",
        lines="""\
        distillation_type (str): With loss_mode 'on_policy_distillation': 'reverse_kl', 'forward_kl', 'gkd', 'generalized_jsd'.
        distillation_temperature (float): Student's and teacher's logits are divided by it.
        distillation_beta (float): Share of the teacher in the mixture of 'gkd' and 'generalized_jsd'.
        hybrid_lambda_rl (float): Weight of the policy loss `hybrid_loss_mode`; 0 is distillation alone.
        hybrid_lambda_distill (float): Weight of the distillation loss.
        hybrid_loss_mode (str): Registered policy loss name beside distillation.
        teacher_path (str or list of str): The frozen teacher, or several; with the student's vocabulary.
        teacher_weights (list of float): Of several teachers, with a sum of 1. None is equal shares.
        teacher_mixture (str): Of several teachers: 'probability', 'logit' or 'loss'.
        teacher_offload (bool): Keep the teacher's shards in CPU memory between uses.
        teacher_trust_remote_code (bool): Run Python code that comes with the teacher.
        distillation_trace (str): Folder for token ids and losses of every micro-batch; None writes nothing.
""",
        why="the fields are explained",
    ),
    Hook(
        file="verl/workers/config/actor.py",
        anchor="    ppo_kl_coef: float = 0.1\n",
        lines="""\
    distillation_type: str = "reverse_kl"
    distillation_temperature: float = 1.0
    distillation_beta: float = 0.5
    hybrid_lambda_rl: float = 0.0
    hybrid_lambda_distill: float = 1.0
    hybrid_loss_mode: str = "vanilla"
    teacher_path: Any = None
    teacher_weights: Optional[list] = None
    teacher_mixture: str = "probability"
    teacher_offload: bool = False
    teacher_trust_remote_code: bool = False
    distillation_trace: Optional[str] = None
""",
        why="verl's own dataclass holds the keys",
    ),
    Hook(
        file="verl/workers/config/actor.py",
        anchor="        valid_loss_agg_modes = [\n",
        before=True,
        lines="""\
        if self.policy_loss.get("loss_mode", "vanilla") == "on_policy_distillation":
            from verl.trainer.ppo.opd_core.settings import check_config

            check_config(self)

""",
        why="a config that cannot work is refused on the driver, before workers start",
    ),
    Hook(
        file="verl/trainer/config/actor/actor.yaml",
        anchor="  ppo_kl_coef: 0.1\n",
        lines="""\

  # On-policy distillation (loss_mode: on_policy_distillation, see ON_POLICY_DISTILLATION.md):
  # the divergence from the teacher: reverse_kl / forward_kl / gkd / generalized_jsd
  distillation_type: reverse_kl

  # Student's and teacher's logits are divided by it
  distillation_temperature: 1.0

  # Share of the teacher in the mixture of gkd and generalized_jsd, between 0 and 1
  distillation_beta: 0.5

  # Weights of the policy loss hybrid_loss_mode and of the distillation loss
  hybrid_lambda_rl: 0.0
  hybrid_lambda_distill: 1.0
  hybrid_loss_mode: vanilla

  # The frozen teacher: folder or hub name, or a list of them with weights whose sum is 1 (null is equal shares)
  # and a mixture: probability / logit / loss
  teacher_path: null
  teacher_weights: null
  teacher_mixture: probability

  # Keep the teacher's shards in CPU memory between uses
  teacher_offload: false

  # Run Python code that comes with the teacher
  teacher_trust_remote_code: false

  # Folder for token ids and losses of every micro-batch; null writes nothing
  distillation_trace: null
""",
        why="Hydra knows the keys and their defaults",
    ),
    Hook(
        file="verl/workers/engine_workers.py",
        anchor="            self.actor.reset()\n",
        lines="""\
            if actor_config.policy_loss.get("loss_mode", "vanilla") == "on_policy_distillation":
                from verl.trainer.ppo.on_policy_distillation import OnPolicyDistillation

                self.loss_fn = OnPolicyDistillation(config=actor_config, engine=self.actor.engine)
""",
        why="the actor's loss function is ours, and the teachers are loaded beside the student",
    ),
    Hook(
        file="verl/workers/engine/fsdp/transformer_impl.py",
        anchor="        model_inputs, output_args = self.prepare_model_inputs(micro_batch=micro_batch)\n",
        lines="""\
        if not forward_only and hasattr(loss_function, "look"):
            loss_function.look(micro_batch, model_inputs)  # on-policy distillation: the teacher reads what the student reads
""",
        why="teacher logits of the same tokens, and verl's own hook for student logits switched on",
    ),
)
