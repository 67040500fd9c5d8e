"""The places where rollouts and teachers are served: what `cpu/` and the placement `pool` hold on to. Needs no verl."""

from __future__ import annotations

from opd.integrations.verl.contract.hooks import NATIVE, PPO, Hook

REPLICA = "verl.workers.rollout.replica"
LOOP = "verl.experimental.teacher_loop"

SERVING = (
    Hook(
        where=f"{REPLICA}:RolloutReplicaRegistry.register",
        needs="name loader",
        why="the replica class of a rollout.name, for the student and for teachers",
    ),
    Hook(
        where=f"{REPLICA}:RolloutReplica",
        needs="replica_rank config model_config gpus_per_node is_teacher_model name_suffix launch_servers servers "
        "_server_handle _server_address max_concurrency init_colocated",
        abstract="launch_servers",
        why="base class of our replicas",
    ),
    Hook(where=f"{REPLICA}:RolloutMode", needs="HYBRID COLOCATED", why="whose GPUs a replica is on"),
    Hook(
        where=f"{REPLICA}:TokenOutput",
        needs="token_ids log_probs stop_reason extra_fields",
        why="what a server answers",
    ),
)

CPU = (
    Hook(
        where="verl.plugin.platform:PlatformBase",
        abstract="device_name vendor_name device_module is_available current_device device_count set_device synchronize "
        "manual_seed manual_seed_all set_allocator_settings empty_cache get_device_capability communication_backend_name "
        "visible_devices_envvar nvtx_range profiler_start profiler_stop ray_resource_name ray_noset_envvars "
        "is_ipc_supported cudart",
        why="base class of CpuPlatform",
        since=(0, 9, 0),
    ),
    Hook(where="verl.plugin.platform:PlatformRegistry.register", why="VERL_PLATFORM=cpu", since=(0, 9, 0)),
    Hook(
        where="verl.plugin.platform.platform_manager:_detect_platform_name",
        says="VERL_PLATFORM",
        why="asks for the platform by name",
        since=(0, 9, 0),
    ),
    Hook(
        where="verl.utils.distributed:initialize_global_process_group_ray",
        says="is_initialized init_process_group RANK WORLD_SIZE DIST_INIT_METHOD",
        why="takes a process group that exists as it is",
    ),
    Hook(
        where=f"{PPO}:actor_rollout_ref.rollout",
        needs="name dtype tensor_model_parallel_size free_cache_engine agent checkpoint_engine",
        why="what +opd_device=cpu overrides",
    ),
    Hook(where=f"{PPO}:trainer", needs="device n_gpus_per_node nnodes", why="what +opd_device=cpu overrides"),
    Hook(where=f"{PPO}:ray_kwargs.ray_init", needs="num_cpus", why="what +opd_device=cpu overrides"),
    Hook(where=f"{PPO}:data", needs="dataloader_num_workers", why="what +opd_device=cpu overrides"),
    Hook(where=f"{PPO}:reward", needs="num_workers", why="what +opd_device=cpu overrides"),
    Hook(
        where="verl.utils.ulysses:gather_seq_scatter_heads",
        needs="x seq_dim head_dim group",
        why="attention over sequences that ranks share: every position of some heads",
    ),
    Hook(where="verl.utils.ulysses:gather_heads_scatter_seq", needs="x head_dim seq_dim group", why="and back"),
    Hook(where="verl.utils.ulysses:get_ulysses_sequence_parallel_group", why="the ranks that share a sequence"),
    Hook(
        where="verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithValueHead",
        why="verl's critic, base class of the one that is registered for a CPU",
    ),
    Hook(
        where="verl.workers.rollout.base:_ROLLOUT_REGISTRY",
        why="the trainer's side of a rollout.name; verl has no function to register one",
    ),
    Hook(
        where="verl.workers.rollout.base:get_rollout_class",
        says="_ROLLOUT_REGISTRY import_module",
        why="imports what that table names",
    ),
    Hook(
        where="verl.workers.rollout.base:BaseRollout",
        needs="config model_config device_mesh",
        abstract="resume update_weights release",
        why="base class of our Adapter",
    ),
    Hook(
        where="verl.workers.rollout.base:BaseRollout.update_weights",
        needs="weights wire_format",
        why="overridden",
        since=(0, 9, 0),
    ),
    Hook(
        where="verl.workers.engine_workers:ActorRolloutRefWorker.update_weights",
        says="rollout update_weights get_per_tensor_param global_steps",
        why="sends the student's weights through our Adapter",
    ),
    Hook(
        where="verl.workers.config:RolloutConfig",
        needs="prompt_length response_length ignore_eos tensor_model_parallel_size data_parallel_size",
        why="how our server samples",
    ),
    Hook(where="verl.workers.config:RolloutConfig", needs="seed", why="what our server samples from", since=(0, 9, 0)),
    Hook(where="verl.utils:normalize_token_ids", why="token ids of a request, whatever they came in"),
    Hook(
        where="verl.experimental.agent_loop.single_turn_agent_loop:SingleTurnAgentLoop.run",
        says="generate prompt_ids sampling_params token_ids log_probs",
        why="asks our server for a response, and takes these fields of its answer",
    ),
)

POOL = (
    Hook(
        where="verl.workers.config:DistillationConfig",
        needs="enabled n_gpus_per_node nnodes teacher_models teacher_key distillation_loss",
        why="the section that verl's teacher servers are started from",
    ),
    Hook(
        where="verl.workers.config:DistillationTeacherModelConfig",
        needs="key model_path inference num_replicas per_replica_world_size world_size _validate_topk_logprobs",
        why="base class of ours, which lets other engines than vLLM and SGLang serve a teacher",
    ),
    Hook(
        where="verl.workers.config:DistillationTeacherModelConfig.validate_and_prepare_for_distillation",
        needs="use_topk topk",
        says="_validate_topk_logprobs max_model_len response_length",
        why="asks for room for one more token, and for top-k",
    ),
    Hook(
        where=f"{PPO}:distillation.teacher_models.teacher_model",
        needs="_target_ key model_path num_replicas inference",
        why="the teacher of the pool",
    ),
    Hook(
        where=f"{LOOP}.teacher_model:TeacherModelManager._initialize_llm_servers",
        says="get_rollout_replica_class inference name is_teacher_model name_suffix model_path init_colocated",
        why="starts our replica for a teacher as for the student",
    ),
    Hook(
        where="verl.single_controller.ray.base:SubRayResourcePool",
        needs="start_bundle_index get_placement_groups world_size",
        why="which GPU of the pool a teacher's server is put on",
    ),
    Hook(
        where=f"{LOOP}.teacher_manager:_get_teacher_sampling_params",
        needs="teacher_model_config distillation_loss_config",
        says="prompt_logprobs max_tokens topk use_topk",
        why="how many scores a teacher is asked for",
    ),
    Hook(
        where=f"{LOOP}.teacher_manager:AsyncTeacherLLMServerManager.compute_teacher_logprobs_single",
        needs="sequence_ids multi_modal_data routing_key",
        says="generate extra_fields prompt_ids prompt_logprobs",
        why="asks a teacher for the scores of a whole sequence; row t is about token t+1",
    ),
    Hook(
        where="verl.experimental.agent_loop.agent_loop:AgentLoopWorker._compute_teacher_logprobs",
        says="extra_fields teacher_ids teacher_logprobs distillation_enabled",
        why="puts the scores beside the response",
    ),
    Hook(
        where="verl.trainer.ppo.padding_utils:construct_minimal_padding_template",
        says="teacher_ids teacher_logprobs",
        why="the only per-token fields of a teacher that survive a batch being filled up",
        since=(0, 9, 1),
    ),
    Hook(
        where="verl.workers.utils.padding:left_right_2_no_padding",
        says="teacher_ids teacher_logprobs",
        why="takes the padding off the scores, as off the tokens",
    ),
    Hook(
        where=f"{NATIVE}.losses:distillation_ppo_loss",
        needs="config distillation_config model_output data student_logits",
        says="compute_topk_loss",
        why="the form that a loss function of the workers has",
    ),
    Hook(
        where="verl.workers.engine_workers:ActorRolloutRefWorker.init_model",
        says="partial distillation_ppo_loss ppo_loss actor_config loss_fn",
        why="binds the loss that a pool's own distillation is taken out of",
    ),
    Hook(
        where=f"{NATIVE}.losses:compute_topk_loss",
        says="teacher_logprobs teacher_ids",
        why="the names under which scores reach a micro-batch",
    ),
    Hook(
        where="verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead.prepare_model_outputs",
        needs="output output_args micro_batch logits_processor_func",
        says="distillation_use_topk student_logits",
        why="where a loss of scores sees the logits",
    ),
)
