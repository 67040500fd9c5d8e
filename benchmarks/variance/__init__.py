"""The variance of one rollout's gradient, by estimator."""
