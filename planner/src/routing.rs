//! Token-level routing traces: which experts each token chose in each MoE layer.
