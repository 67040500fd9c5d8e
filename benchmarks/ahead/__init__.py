"""rollout.ahead: how much sooner a step is done when the next step's rollouts are drawn meanwhile."""
