"""Every place where this plugin holds on to verl, as data: what is called, overridden or read there, and why. Needs no verl.

`hook_check` looks them up in verl's source. A release of verl that moves one is told by its name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Hook:
    """One class, function or table of verl, or one section of its config."""

    where: str
    """`module:Dotted.name`, `module:` for the whole module, or `path/in/verl.yaml:dotted.section`."""
    needs: str = ""
    """Parameters of a function; methods, fields, attributes and constructor parameters of a class; keys of a section."""
    says: str = ""
    """Names, strings and `keyword=`s that stand in it: what it reads, sets or calls, where no signature shows that."""
    abstract: str | None = None
    """All methods that a subclass has to define, where ours is one: one more would make ours unusable."""
    why: str
    since: tuple[int, int, int] = (0, 8, 0)
    """The first release that has it. How verl 0.8 is served without is said in `v080`."""


FSDP = "verl.workers.engine.fsdp.transformer_impl"
WORKERS = "verl.workers.engine_workers"
NATIVE = "verl.trainer.distillation"
PPO = "trainer/config/_generated_ppo_trainer.yaml"
ACTOR = f"{PPO}:actor_rollout_ref.actor"
SILENT = "interpolated with a default, so that a key that moved would go unnoticed"

CONFIG = (
    Hook(
        where="verl:",
        says="verl.plugins VERL_USE_EXTERNAL_PLUGINS",
        why="`import verl` loads plugin.py, in every process",
        since=(0, 9, 0),
    ),
    Hook(where="verl:", says="VERL_USE_EXTERNAL_MODULES __version__", why="the other way in; and which verl this is"),
    Hook(
        where="verl.utils.config:omega_conf_to_dataclass",
        needs="config dataclass_type",
        says="_target_ instantiate",
        why="calls what `_target_` names: actor_config and OpdEngineConfig in place of verl's classes",
    ),
    Hook(
        where="verl.utils.config:validate_config",
        needs="config",
        says="omega_conf_to_dataclass actor_config validate",
        why="calls OpdActorConfig.validate, which refuses a config before workers start",
    ),
    Hook(where="verl.trainer.main_ppo:", says="validate_config", why="asks for that check"),
    Hook(
        where="verl.workers.config:FSDPActorConfig",
        needs="strategy fsdp_config policy_loss entropy_coeff use_kl_loss calculate_sum_pi_squared engine",
        why="base class of OpdActorConfig; checks.py is told these fields",
    ),
    Hook(
        where="verl.workers.config:FSDPActorConfig.validate",
        needs="n_gpus train_batch_size model_config",
        why="overridden",
    ),
    Hook(
        where="verl.workers.config:FSDPActorConfig.__post_init__",
        says="engine fsdp_config",
        why="hands fsdp_config, our OpdEngineConfig, to the worker as the engine's config",
    ),
    Hook(
        where="verl.workers.config:FSDPEngineConfig",
        needs="strategy model_dtype mixed_precision offload_policy reshard_after_forward fsdp_size wrap_policy "
        "use_torch_compile ulysses_sequence_parallel_size __post_init__",
        why="base class of OpdEngineConfig; the teacher's settings are copied from the actor's",
    ),
    Hook(
        where="verl.workers.config:HFModelConfig",
        needs="path local_path trust_remote_code override_config use_remove_padding enable_gradient_checkpointing "
        "lora_rank hf_config tokenizer processor generation_config external_lib tokenizer_path hf_config_path use_shm",
        why="the student's is read and the teacher's is made",
    ),
    Hook(
        where="verl.trainer.ppo.utils:need_reference_policy", needs="config", why="the dry run asks for validate_config"
    ),
    Hook(where="verl.trainer.ppo.utils:need_critic", needs="config", why="the dry run asks for validate_config"),
    Hook(
        where="verl.utils.import_utils:import_external_libs",
        needs="external_libs",
        why="what model.external_lib names is imported on the driver, as HFModelConfig does in a worker",
    ),
    Hook(where="verl.utils.fs:copy_to_local", needs="src", why="the models that the driver looks at"),
    Hook(
        where=ACTOR,
        needs="_target_ strategy fsdp_config policy_loss loss_agg_mode loss_scale_factor",
        why="what +opd=default overrides or interpolates",
    ),
    Hook(where=f"{ACTOR}.fsdp_config", needs="_target_ use_torch_compile", why="replaced by OpdEngineConfig"),
    Hook(
        where=f"{PPO}:actor_rollout_ref.model",
        needs="_target_ path tokenizer_path hf_config_path trust_remote_code use_shm use_fused_kernels external_lib "
        "override_config lora_rank",
        why="the driver makes HFModelConfig of it; " + SILENT,
    ),
    Hook(
        where=f"{PPO}:actor_rollout_ref.rollout", needs="name temperature top_p top_k calculate_log_probs", why=SILENT
    ),
    Hook(where=f"{PPO}:distillation", needs="enabled", why=SILENT),
)

ENGINE = (
    Hook(
        where="verl.workers.engine:EngineRegistry",
        needs="register get_engine_cls new _engines",
        why="where verl's workers look for an engine",
    ),
    Hook(where="verl.workers.engine:EngineRegistry.register", needs="model_type backend device", why="takes OpdEngine"),
    Hook(
        where="verl.workers.engine:EngineRegistry.register",
        needs="vendor",
        why="an engine of this vendor comes before verl's own, which is for every vendor of the device",
        since=(0, 9, 0),
    ),
    Hook(
        where=f"{WORKERS}:TrainingWorker.__init__",
        says="EngineRegistry new model_type= backend= strategy model_config= engine_config= optimizer_config= checkpoint_config=",
        why="builds the engine that the config's strategy names, with these arguments",
    ),
    Hook(
        where=f"{WORKERS}:ActorRolloutRefWorker.init_model",
        says="omega_conf_to_dataclass actor_config engine",
        why="makes OpdActorConfig in the worker, and so registers OpdEngine before the engine is looked up",
    ),
    Hook(
        where=f"{FSDP}:FSDPEngineWithLMHead",
        needs="model_config engine_config optimizer_config checkpoint_config module rank _autocast_dtype train_mode "
        "eval_mode get_data_parallel_group optimizer_zero_grad infer_batch",
        why="base class of OpdEngine, whose attributes are read in every step",
    ),
    Hook(where=f"{FSDP}:FSDPEngine.initialize", says="_build_model_optimizer", why="overridden"),
    Hook(
        where=f"{FSDP}:FSDPEngineWithLMHead.forward_step",
        needs="micro_batch loss_function forward_only",
        says="prepare_model_inputs get_device_id get_data_parallel_group model_output= data= dp_group= loss metrics",
        why="overridden for training steps: calls the loss function and makes its output as verl does here",
    ),
    Hook(
        where=f"{FSDP}:FSDPEngine.forward_backward_batch",
        needs="data loss_function forward_only",
        says="forward_step micro_batch loss_function= forward_only= backward batch_num_tokens= dp_size= loss_mask",
        why="calls forward_step, and puts the global counts into the micro-batches that weights are made of",
    ),
    Hook(
        where=f"{FSDP}:FSDPEngineWithLMHead.prepare_model_inputs",
        needs="micro_batch",
        says="input_ids position_ids attention_mask use_remove_padding NO_PADDING temperature",
        why="one set of inputs for student and teacher, in whose positions alignment.py counts",
    ),
    Hook(
        where=f"{FSDP}:FSDPEngineWithLMHead.prepare_model_inputs",
        says="ulysses_pad_and_slice_inputs sp_size= pad_size",
        why="cuts packed sequences between ranks; shard.py counts the positions of each slice",
    ),
    Hook(
        where=f"{FSDP}:FSDPEngine.__init__",
        says="_init_device_mesh",
        why="sets use_ulysses_sp and ulysses_parallel_group, the ranks that share a sequence",
    ),
    Hook(
        where=f"{FSDP}:FSDPEngine._init_device_mesh",
        says="use_ulysses_sp ulysses_parallel_group ulysses_device_mesh",
        why="sets them",
    ),
    Hook(
        where="verl.utils.ulysses:gather_outputs_and_unpad",
        needs="x gather_dim unpad_dim padding_size group",
        why="log-probs of all tokens for verl's policy loss, from the ranks that share a sequence",
    ),
    Hook(
        where="verl.utils.ulysses:Gather.backward",
        says="grad_scaler sp_world_size",
        why="multiplies by the ranks that share a sequence, as our loss does",
    ),
    Hook(
        where="verl.workers.engine.utils:postprocess_batch_func",
        needs="output_lst",
        says="metrics loss model_output",
        why="makes the output of forward_backward_batch, to whose metrics ours are added",
    ),
    Hook(where="verl.utils.device:get_vendor", why="the vendor that OpdEngine registers for", since=(0, 9, 0)),
    Hook(where="verl.utils.device:get_device_name", why="the device that OpdEngine registers for, and autocast's"),
    Hook(where="verl.utils.device:get_device_id", why="where micro-batches go"),
    Hook(
        where="verl.utils.tensordict_utils:get_non_tensor_data",
        needs="data key default",
        why="flags of a micro-batch",
    ),
    Hook(where="verl.utils.metric:Metric", needs="aggregation value aggregate", why="actor/opd/*"),
    Hook(where="verl.utils.metric:AggregationType", needs="MEAN SUM", why="how ours are joined"),
    Hook(
        where="verl.workers.utils.padding:no_padding_2_padding",
        needs="tensor data",
        says="prompts responses",
        why="verl's own shift by one, given positions instead of log-probs",
    ),
    Hook(
        where="verl.trainer.ppo.core_algos:agg_loss",
        needs="loss_mat loss_mask loss_agg_mode dp_size batch_num_tokens global_batch_size loss_scale_factor",
        why="its gradient is the weight of each token",
    ),
    Hook(
        where="verl.trainer.ppo.ray_trainer:RayPPOTrainer._update_actor",
        says="global_batch_size ppo_mini_batch_size",
        why="the number of sequences that sequence means divide by",
    ),
    Hook(
        where="verl.trainer.ppo.v1.trainer_base:PPOTrainer._update_actor",
        says="global_batch_size ppo_mini_batch_size",
        why="the same in the trainer that 0.9 brought",
        since=(0, 9, 0),
    ),
    Hook(
        where="verl.workers.utils.losses:ppo_loss",
        needs="config model_output data dp_group",
        says="log_probs entropy response_mask old_log_probs advantages",
        why="the policy loss of a hybrid step, from log-probs and entropies that we make",
    ),
)

TEACHER = (
    Hook(
        where=f"{FSDP}:FSDPEngine.__init__",
        needs="model_config engine_config optimizer_config checkpoint_config",
        why="verl's engine builds the teacher, without an optimizer",
    ),
    Hook(where=f"{FSDP}:FSDPEngine._build_module", why="loads the teacher"),
    Hook(
        where=f"{FSDP}:FSDPEngine._build_fsdp_module",
        needs="module",
        says="offload_policy forward_only CPUOffloadPolicy",
        why="shards the teacher; told to pin no memory on a CPU",
    ),
    Hook(
        where=f"{FSDP}:FSDPEngine.to",
        needs="device model optimizer grad",
        says="offload_fsdp_model_to_cpu load_fsdp_model_to_gpu",
        why="overridden: where the student's weights leave the accelerator, the teacher's shards do",
    ),
    Hook(
        where=f"{FSDP}:FSDPEngine.is_param_offload_enabled", why="whether verl moves the student's weights between uses"
    ),
    Hook(where="verl.utils.fsdp_utils:offload_fsdp_model_to_cpu", needs="model", why="moves the teacher's shards"),
    Hook(where="verl.utils.fsdp_utils:load_fsdp_model_to_gpu", needs="model", why="and back"),
    Hook(where=f"{FSDP}:FSDPEngine.disable_adapter", why="the student's base as a teacher"),
)

LOSS = (
    Hook(
        where=f"{NATIVE}.losses:distillation_loss",
        needs="config distillation_config model_output data",
        says="loss_max_clamp clamp agg_loss",
        why="the native loss that ours is compared with",
    ),
    Hook(
        where=f"{NATIVE}.losses:compute_forward_kl_topk",
        needs="config distillation_config model_output data",
        says="distillation_losses student_mass teacher_mass clamp_min",
        why="its clamp at 0",
    ),
    Hook(
        where=f"{NATIVE}.fsdp.losses:compute_forward_kl_topk",
        needs="student_logits teacher_topk_log_probs teacher_topk_ids config",
        says="log_prob_min_clamp clamp_min",
        why="its sum over the support, which leaves the tail out",
    ),
    Hook(
        where="verl.workers.config:DistillationLossConfig",
        needs="loss_mode topk use_task_rewards use_policy_gradient loss_max_clamp log_prob_min_clamp loss_settings "
        "_mutable_fields __post_init__",
        why="its settings, and base class of what verl's teacher servers are told",
    ),
    Hook(where=f"{NATIVE}.losses:register_distillation_loss", needs="loss_settings", why="a name for a loss of ours"),
    Hook(
        where=f"{NATIVE}.losses:DistillationLossSettings",
        needs="names use_topk use_estimator",
        why="what that name asks of verl's teachers",
    ),
    Hook(
        where="verl.trainer.ppo.core_algos:register_policy_loss",
        needs="name",
        why="puts the policy loss on_policy_distillation, called with logits, into verl's registry",
    ),
    Hook(
        where=f"{WORKERS}:ActorRolloutRefWorker.set_loss_fn",
        needs="loss_fn",
        why="puts a loss function of ours into the workers",
    ),
)
