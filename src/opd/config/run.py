"""`RunSettings`: the sections of a whole run, and the rules between them. Imports no torch: a recipe is refused before it is there."""

from __future__ import annotations

from dataclasses import field, replace

from opd.config.guard import GuardConfig
from opd.config.loss_rules import check_kept_rollouts, check_on_policy, check_rewarded_rollouts
from opd.config.model import ModelConfig, StudentConfig
from opd.config.optimizer import OptimizerConfig
from opd.config.prompts import PromptsConfig
from opd.config.rl import RewardConfig, RlConfig
from opd.config.rollout import RolloutConfig
from opd.config.save import SaveConfig
from opd.config.sections import Section
from opd.config.teachers import MixtureConfig, TeacherConfig
from opd.config.train import CheckpointConfig, EvalConfig, LogConfig, TrainConfig
from opd.config.vllm import MAX_VLLM_TEMPERATURE
from opd.errors import require
from opd.losses.settings import ObjectiveSettings


def teacher_key(name: str) -> str:
    """The teacher's section in a recipe."""
    return name if name == "teacher" else f"teachers.{name}"


class RunSettings(Section):
    """A whole run, with the settings of its objective. `Config` has the objective itself."""

    student: StudentConfig
    teacher: TeacherConfig | None = None
    teachers: dict[str, TeacherConfig] = field(default_factory=dict[str, TeacherConfig])
    """Several teachers by name, in place of `teacher`: --teachers.math.model PATH --teachers.code.model PATH."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    prompts: PromptsConfig
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    rl: RlConfig = field(default_factory=RlConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    run_dir: str = "runs/opd"
    """Folder of this run: resolved config, metrics, samples, checkpoints, student, report."""
    seed: int = 0
    """Every random draw of the run derives from it."""

    def __post_init__(self) -> None:
        require(bool(self.run_dir.strip()), "run_dir is empty; name a folder for this run, e.g. runs/first.")
        warmup = self.optimizer.warmup_within(self.train.steps)
        self._fill_in(optimizer=replace(self.optimizer, warmup_steps=warmup))
        self._check_teachers()
        if self.eval.every > 0:
            self.prompts.check_held_out(self.eval.prompts)
        self.rl.check(self.objective, samples_per_prompt=self.train.samples_per_prompt)
        part = self.train.token_fraction < 1
        require(
            not part or self.rollout.lmbda == 1,
            f"train.token_fraction={self.train.token_fraction} needs the entropy of the student that drew each token, and rollout.lmbda="
            f"{self.rollout.lmbda} takes some from elsewhere; set one of them to 1.",
        )
        require(
            not part or self.objective.discount == 0,
            f"objective.discount={self.objective.discount} adds what all later tokens earn, and train.token_fraction="
            f"{self.train.token_fraction} leaves some out; set discount=0 or token_fraction=1.",
        )
        temperatures = {"rollout.temperature": self.rollout.temperature, "eval.temperature": self.eval.temperature}
        temperatures |= {"eval.extra_temperatures": max(self.eval.extra_temperatures, default=0.0)}
        for key, temperature in temperatures.items() if self.rollout.engine == "vllm" else ():
            require(
                temperature <= MAX_VLLM_TEMPERATURE,
                f"{key}={temperature:g}, and vLLM takes temperatures up to {MAX_VLLM_TEMPERATURE:g}; lower it, or set rollout.engine=hf.",
            )
        require(
            not part or self.rollout.engine == "hf",
            f"train.token_fraction={self.train.token_fraction} keeps the tokens of highest entropy, and rollout.engine=vllm returns log-probs "
            "of the sampled tokens and no entropies; set train.token_fraction=1, or rollout.engine=hf.",
        )
        require(
            not self.student.load_options or self.rollout.engine == "hf",
            "rollout.engine=vllm takes the student's whole weights after every step, and student.load_options leaves none to send; drop "
            "one of them.",
        )
        if self.optimizer.name == "natural_gradient":
            self._check_natural_gradient()
        if self.rollout.source == "cached":
            check_kept_rollouts(self.objective, rewarded=self.rl.rewarded, token_fraction=self.train.token_fraction)
        check_on_policy(self.objective, self.rollout)
        require(
            self.rollout.cross_entropy == 0 or not self.objective.eos_groups,
            "rollout.cross_entropy asks for the probability of single tokens, and objective.eos_groups makes groups of them one; drop one.",
        )
        if self.rl.rewarded:
            check_rewarded_rollouts(self.objective, self.rollout)

    @property
    def judges_rollouts(self) -> bool:
        """True where the responses of training steps get a reward, whether the loss reads it or not."""
        return self.rl.rewarded or self.judges_besides

    @property
    def judges_besides(self) -> bool:
        """True where a reward is asked for that no loss reads."""
        return "correct" in self.train.drop or self.log.reward

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """Every teacher by name; one alone is called 'teacher'."""
        return {"teacher": self.teacher} if self.teacher is not None else dict(self.teachers)

    @property
    def all_models(self) -> dict[str, ModelConfig]:
        """The student and every teacher by their sections: student, teacher or teachers.NAME."""
        return {"student": self.student, **{teacher_key(name): one for name, one in self.all_teachers.items()}}

    def _check_natural_gradient(self) -> None:
        student = self.student
        require(
            not student.gradient_checkpointing,
            "student.gradient_checkpointing=true recomputes activations once per backward pass, and natural_gradient goes back through "
            "them dozens of times a step. Drop it, and save memory with optimizer.natural_gradient.keep_graphs=false and a smaller "
            "train.tokens_per_microbatch.",
        )
        require(
            student.dtype != "float16",
            "student.dtype=float16 has no room for the products of small numbers that natural_gradient's second derivatives are made of. "
            "Use bfloat16 with the same adapters, or optimizer.name=adamw.",
        )
        require(
            student.attn_implementation in (None, "sdpa", "eager"),
            f"student.attn_implementation={student.attn_implementation} has one derivative, and natural_gradient needs two. Use sdpa or "
            "eager, or optimizer.name=adamw.",
        )
        require(
            student.dtype in ("auto", "float32") or student.lora is not None,
            f"student.dtype={student.dtype} rounds away most of a natural-gradient step. Use float32, or float32 adapters on such a "
            "student (student.lora.rank=32).",
        )

    def _check_teachers(self) -> None:
        there = self.all_teachers
        require(
            bool(there) or not self.rl.distilled,
            "'teacher' is not set, and has no default. Add it to the recipe or pass --teacher.model VALUE; learning from a reward alone "
            "(rl.weight=1, rl.distill_weight=0) needs none.",
        )
        require(
            bool(there) or self.rollout.off_policy == "dataset",
            "rollout.off_policy=teacher draws samples from the teacher, and there is none; set teacher.model, or drop it.",
        )
        require(
            self.teacher is None or not self.teachers,
            f"teacher is one teacher, and teachers ({', '.join(self.teachers)}) are several; put it among teachers under a name of its "
            "own, or drop one of the two sections.",
        )
        require(
            len(there) > 1 or self.mixture == MixtureConfig(),
            "mixture says how several teachers make one, and there are not several; add the section teachers, or drop mixture.",
        )
        wrong = [name for name in self.teachers if not name or any(c in name for c in "./ ")]
        require(
            not wrong,
            f"teachers.{wrong and wrong[0]!r}: a teacher's name is a plain word, without dots, slashes and spaces.",
        )
        self.mixture.check_names(list(there))
        for name, teacher in there.items() if self.rl.distilled else ():
            teacher.check_objective(self.objective, name if self.teacher is not None else f"teachers.{name}")
        served = [name for name, teacher in there.items() if teacher.url]
        partly = [name for name, teacher in there.items() if teacher.sends_log_probs]
        require(
            not partly or self.mixture.kind == "routing",
            f"mixture.kind={self.mixture.kind} mixes whole distributions, and a server sends some log-probs of one (teachers."
            f"{partly and partly[0]}.url). Use mixture.kind=routing, opd serve-teacher (api: opd), or teachers in this process.",
        )
        require(
            not served or self.rollout.lmbda == 1 or self.rollout.off_policy == "dataset",
            "rollout.off_policy=teacher draws samples from the teacher, and one behind teacher.url only scores; use "
            "rollout.off_policy=dataset, or rollout.lmbda=1.",
        )
        self._check_self_teaching()

    def _check_self_teaching(self) -> None:
        there = self.all_teachers.values()
        require(
            self.student.lora is not None or all(t.source != "adapter_off" for t in there),
            "teacher.source=adapter_off is the student without its adapter, and it has none; set student.lora.rank, or use source=ema.",
        )
        require(
            bool(there) or self.prompts.teacher_prompt is None,
            "prompts.teacher_prompt is what a teacher reads, and there is none; set teacher.model or teacher.source, or drop it.",
        )
        same = self.objective.student_temperature == self.objective.teacher_temperature
        alone = bool(there) and all(t.source != "model" for t in there) and not self.rl.rewarded
        require(
            not (alone and same and self.prompts.teacher_prompt is None),
            "A teacher with the student's own first weights agrees with it everywhere, so nothing would ever be learnt. Show it more with "
            "prompts.teacher_prompt, give it an objective.teacher_temperature below 1, or add a reward (rl.weight).",
        )
