use tierwise_cost::{model::ModelSpec, quant::QuantFormat};
use tierwise_planner::CheckedPlan;
#[derive(Clone, Copy)]
pub struct PlanOptions { pub context: u32, pub chunk: u32, pub kv: QuantFormat, pub threads: usize }
pub fn ram_plan(spec: &ModelSpec, o: PlanOptions) -> CheckedPlan { CheckedPlan::stub(spec, o.kv, o.context.min(spec.context_length), o.chunk) }
pub fn disk_plan() {}
