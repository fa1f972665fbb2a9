//! Experts over many devices (expert parallelism): who holds which experts, who computes which tokens, and when weights move.
//!
//! Three levels over one cost model, each faster and nearer to the batch than the one before:
//! * L1 [`place`]: which experts every device holds, and how often (minutes to hours between changes);
//! * L2 [`split`]: how the tokens of one batch are divided among the holders, exactly (microseconds, nothing moves);
//! * L3 [`spill`]: copies of experts for what is left, if the seconds won exceed the seconds of the copy.
//!
//! L1 has more to weigh than one layer's tokens: [`terms`] prices copies and pairs of experts, [`packs`] has what does not fit on GPUs,
//! [`budget`] shares slots among layers, [`replan`] starts from a placement in use, [`affinity`] keeps tokens where they are.
//!
//! * [`eplb`], [`lla`]: what others do, output-equal; [`loads`]: what there is to balance; [`metrics`]: how well it is balanced;
//! * [`cost`]: seconds of a layer on a cluster; [`decide`]: one layer under a policy; [`replay`]: a load log under every policy; [`fig4`]: a published study as a test of that;
//! * [`moves`]: from one placement to another while serving.

pub mod affinity;
pub mod budget;
pub mod cost;
mod cuts;
pub mod decide;
pub mod eplb;
pub mod fig4;
pub mod holders;
mod judge;
pub mod lla;
pub mod loads;
pub mod metrics;
pub mod moves;
pub mod packs;
pub mod place;
pub mod relabel;
pub mod replan;
pub mod replay;
pub mod result;
mod robust;
mod search;
pub mod spill;
pub mod split;
pub mod terms;
