"""Checks of verl's config before any worker starts. Needs no verl."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from opd.errors import ConfigError
from opd.integrations.verl.plugin.settings import Settings, TeacherSettings

STRATEGIES = ("fsdp2", "fsdp")
GUARDED = ("opd_sync", "opd_colocate_async", "opd_separate_async")
"""The values of trainer.v1.trainer_mode whose trainers look at opd.guard (`guarded_trainer`)."""


@dataclass(frozen=True, kw_only=True)
class TeacherServers:
    """verl's own teacher servers, as its `distillation:` section describes them."""

    engine: str
    model_path: str | None
    teachers: tuple[str, ...] = ("teacher_model",)
    """Keys of distillation.teacher_models."""
    max_logprobs: int | None = None
    """vLLM's; verl sets it to top_k where it is None."""
    tensor_parallel: int = 1


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The values of verl's other sections that the checks read."""

    strategy: str
    sequence_parallel: int = 1
    loss_mode: str = "vanilla"
    entropy_coeff: float = 0.0
    use_kl_loss: bool = False
    sum_pi_squared: bool = False
    native_distillation: bool = False
    pool: TeacherServers | None = None
    """None without +opd=pool or +opd=hidden."""
    native_fused_kernels: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    loss_agg_mode: str = "token-mean"
    loss_scale_factor: float | None = None
    trainer_mode: str | None = GUARDED[0]
    """trainer.v1.trainer_mode; None in a verl that has no such key."""
    use_v1: bool = True


def check_run(settings: Settings, run: RunFacts) -> None:
    """Raise ConfigError for the first thing in verl's config that this distillation cannot live with."""
    for check in (_selection, _pool, _engine, _sampled_tokens, _guard):
        for problem in check(settings, run):
            raise ConfigError(problem)


def remarks(settings: Settings, run: RunFacts) -> tuple[str, ...]:
    """Lines for the log about what is allowed but biased, or not looked at."""
    unguarded = _unguarded(settings, run)
    return (*_biased(settings, run), *([f"warning: {unguarded}"] if unguarded else []))


def _biased(settings: Settings, run: RunFacts) -> tuple[str, ...]:
    if not _weighs_samples(settings) or run.loss_agg_mode != "token-mean":
        return ()
    return (
        f"actor.loss_agg_mode=token-mean with {_sampled_loss(settings)}: a token's weight, 1 over the mini-batch's response tokens, depends on that "
        "token, so the expected gradient is off by about 1 / (responses of a mini-batch). actor.loss_agg_mode=seq-mean-token-sum-norm with "
        "actor.loss_scale_factor=<data.max_response_length> has no such error.",
    )


NEVER_HERE = ("canary", "start_kl")
"""Rules whose numbers the trainer of opd measures alone."""


def _guard(settings: Settings, run: RunFacts) -> Iterator[str]:
    watched = {name: rule for name, rule in settings.guard.rules.items() if name not in NEVER_HERE}
    stops = [name for name, rule in watched.items() if rule.action == "stop"]
    unguarded = _unguarded(settings, run)
    if stops and unguarded:
        yield f"opd.guard.{stops[0]}.action=stop would never stop this run: {unguarded}"


def _unguarded(settings: Settings, run: RunFacts) -> str:
    """The reason why nothing looks at opd.guard, with what to do; empty where something does, or has no rule."""
    if not settings.guard.rules or (run.use_v1 and run.trainer_mode in GUARDED):
        return ""
    if run.trainer_mode is None or not run.use_v1:
        return "opd.guard is looked at by the trainers of verl 0.9 with trainer.use_v1=true, and this run has another; use one of them."
    own = f"opd_{run.trainer_mode}"
    wanted = own if own in GUARDED else GUARDED[0]
    return (
        f"trainer.v1.trainer_mode={run.trainer_mode} does not look at opd.guard; set trainer.v1.trainer_mode={wanted}."
    )


def _selection(settings: Settings, run: RunFacts) -> Iterator[str]:
    if run.native_distillation and not settings.is_served:
        yield (
            "distillation.enabled=true starts verl's own distillation, with a pool of GPUs for its teacher, beside opd's; set "
            "distillation.enabled=false: with opd.placement=actor the teacher runs in the actor's workers. For opd's losses from verl's "
            "teacher servers use +opd=pool."
        )
    if run.loss_mode == "on_policy_distillation" and settings.rl.rewarded:
        yield (
            f"actor.policy_loss.loss_mode=on_policy_distillation names no policy loss, but opd.rl.weight={settings.rl.weight:g} asks for "
            "one; set loss_mode to verl's own (vanilla, gspo, …), or opd.rl.weight=0."
        )
    if settings.rl.rewarded:
        return
    idle = [f"actor.entropy_coeff={run.entropy_coeff:g}"] if run.entropy_coeff != 0 else []
    idle += ["actor.use_kl_loss=true"] if run.use_kl_loss else []
    if idle:
        yield (
            f"{' and '.join(idle)} belongs to verl's own loss, which opd.rl.weight=0 switches off; drop it, or set opd.rl.weight > 0."
        )


POOL_ENGINES = ("vllm", "sglang", "transformers")
"""Servers that answer `prompt_logprobs` as verl reads them; the last is that of +opd_device=cpu."""
HIDDEN_ENGINE = "opd_hidden"
SERVER = "distillation.teacher_models.teacher_model.inference"
SERVER_SIDE = ("dtype", "offload", "attn_implementation", "source")
"""Keys of opd.teacher that a server is told elsewhere or cannot follow."""


def _pool(settings: Settings, run: RunFacts) -> Iterator[str]:
    """Of placements whose teacher is in verl's servers."""
    if not settings.is_served:
        return
    if run.pool is None or not run.native_distillation:
        yield (
            f"opd.placement={settings.placement} reads what teacher servers of verl's say, and this config starts none; use "
            f"+opd={settings.placement} in place of another group."
        )
        return
    if not settings.rl.distilled:
        yield f"opd.rl.distill_weight=0 asks nothing of the teacher's servers; use +opd=default, not +opd={settings.placement}."
    if len(settings.all_teachers) > 1 or run.pool.teachers != ("teacher_model",):
        yield (
            f"opd.placement={settings.placement} takes one teacher, and there are opd's {', '.join(settings.all_teachers)} and "
            f"distillation.teacher_models' {', '.join(run.pool.teachers)}; leave teacher_model alone, or use +opd=default for several."
        )
    (one, *_) = settings.all_teachers.values()
    served_head = settings.placement == "hidden"
    for name in SERVER_SIDE:
        if getattr(one, name) != getattr(TeacherSettings, name) and not (served_head and name == "offload"):
            yield f"opd.teacher.{name} is about a teacher in the actor's workers; drop it, or tell the server in {SERVER}."
    if run.pool.model_path != one.model:
        yield (
            f"distillation.teacher_models.teacher_model.model_path={run.pool.model_path} is not opd.teacher.model={one.model}; "
            "set the latter alone: the former follows it."
        )
    if not served_head:
        yield from _scores(settings, run.pool)
        return
    if run.pool.engine != HIDDEN_ENGINE:
        yield f"{SERVER}.name={run.pool.engine} sends no hidden states; set it to {HIDDEN_ENGINE}, or use +opd=pool."
    if run.pool.tensor_parallel != 1:
        yield (
            f"{SERVER}.tensor_model_parallel_size={run.pool.tensor_parallel}: {HIDDEN_ENGINE} holds the teacher on one GPU; set it to 1, or use "
            "+opd=pool or +opd=default for a teacher that needs more."
        )


def _scores(settings: Settings, pool: TeacherServers) -> Iterator[str]:
    objective = settings.objective
    if pool.engine not in POOL_ENGINES:
        yield f"{SERVER}.name={pool.engine} gives verl no log-probs of a prompt; set {SERVER}.name=vllm or sglang."
    supplies = "sampled" if objective.support == "sampled" else "top_k"
    objective.check_supplies((supplies,), str(pool.model_path), objective.top_k)
    if objective.support == "sampled":
        return
    if settings.adds_advantages:
        yield (
            "opd.rl.combine=advantages needs the teacher's log-prob of every sampled token, and a server of top-k gives it for few; use "
            "opd.objective.support=sampled with estimator=k1 and delivery=advantage, or opd.rl.combine=losses."
        )
    if objective.include_sampled:
        yield (
            "opd.objective.include_sampled needs the teacher's log-prob of every sampled token, and verl drops it where it is not among the "
            "top_k; drop it, or use +opd=default."
        )
    if objective.tail == "sampled":
        yield (
            "opd.objective.tail=sampled needs the teacher's log-prob of every sampled token, and verl drops it where it is not among the top_k; use "
            "opd.objective.tail=bucket, or +opd=default."
        )
    if pool.engine == "vllm" and pool.max_logprobs is not None and pool.max_logprobs < (objective.top_k or 0):
        yield (
            f"{SERVER}.engine_kwargs.vllm.max_logprobs={pool.max_logprobs} is less than opd.objective.top_k={objective.top_k}, and the server would "
            f"refuse every request; drop it or set max_logprobs={objective.top_k}, or lower opd.objective.top_k."
        )


def _engine(settings: Settings, run: RunFacts) -> Iterator[str]:
    if run.strategy not in STRATEGIES:
        yield (
            f"actor.strategy={run.strategy}: opd takes hidden states inside FSDP's forward pass, where the output layer is whole; set "
            "actor_rollout_ref.actor.strategy=fsdp2."
        )
    if not settings.rl.distilled:
        return
    if run.sequence_parallel > 1 and settings.objective.discount > 0:
        yield (
            f"ulysses_sequence_parallel_size={run.sequence_parallel} cuts a response between workers, and opd.objective.discount="
            f"{settings.objective.discount:g} adds up along it; set opd.objective.discount=0, or the size to 1."
        )
    if run.native_fused_kernels:
        yield (
            "model.use_fused_kernels=true makes the model's forward pass skip the output layer, where opd works; set it to false: opd's "
            "kernels do not make the logits either."
        )
    if run.sum_pi_squared:
        yield "actor.calculate_sum_pi_squared=true needs the whole logits, which opd does not make; set it to false."


def _sampled_tokens(settings: Settings, run: RunFacts) -> Iterator[str]:
    """Losses of the sampled token are right only for tokens drawn from the student, or reweighted to be, and only under weights in
    `loss_agg_mode` that do not depend on them."""
    if not _weighs_samples(settings):
        return
    objective, loss, mode = settings.objective, _sampled_loss(settings), run.loss_agg_mode
    reweighted = objective.estimator in ("k1", "exact") and objective.discount == 0
    if run.temperature != objective.student_temperature and not reweighted:
        yield (
            f"rollout.temperature={run.temperature:g} draws tokens from another distribution than {loss} trains, at "
            f"opd.objective.student_temperature={objective.student_temperature:g}; make the two equal, or use opd.objective.support=full."
        )
    if run.top_p < 1 or run.top_k > 0:
        yield (
            f"rollout.top_p={run.top_p:g} and top_k={run.top_k} never draw some tokens, and {loss} cannot make up for that; set "
            "top_p=1.0 and top_k=-1, or use opd.objective.support=full."
        )
    if mode == "seq-mean-token-mean":
        yield (
            f"actor.loss_agg_mode={mode} with {loss}: a token's weight, 1 over the length of its response, depends on that token, "
            "so the expected gradient is not the divergence's, however large the batch; set actor.loss_agg_mode=seq-mean-token-sum-norm "
            "with actor.loss_scale_factor=<data.max_response_length>."
        )
    if mode == "seq-mean-token-sum-norm" and run.loss_scale_factor is None:
        yield (
            f"actor.loss_agg_mode={mode} without actor.loss_scale_factor divides by the longest response of each micro-batch, and with "
            f"{loss} that depends on the very tokens that it weighs; set actor.loss_scale_factor=<data.max_response_length>."
        )


def _weighs_samples(settings: Settings) -> bool:
    return settings.rl.distilled and settings.objective.looks_at_sample


def _sampled_loss(settings: Settings) -> str:
    objective = settings.objective
    return (
        f"opd.objective.estimator={objective.estimator}"
        if objective.support == "sampled"
        else "opd.objective.tail=sampled"
    )
