//! Runs the operation list of [`tierwise_cost::op`] on the CPU.
//!
//! * [`executor`]: the interpreter of the list; `elementwise`: norms and gates. * [`mod@reference`]: the same list, slow and obvious: the oracle.
//! * [`model`]: weights as they lie in the files. * [`matmul`], [`prepared`]: products over the threads.
//! * [`attention`], [`mla`], [`delta_net`], [`flash`], [`kv_cache`], [`rope`]: how tokens see each other.
//! * [`route`], [`forced`], [`experts`]: where each token goes.
//! * [`driver`], [`loader`], [`slots`]: carry out what the planner's engine decides about experts. * [`foresight`]: guesses for it. * [`remote`]: experts that other ranks compute.
//! * [`step_ops`]: the list itself, lowered once.
//! * [`placed`]: experts on the memory nodes that a plan names.
//! * [`buffers`], [`threads`]: memory and threads of a session. * [`beside`]: threads kept beside the nodes of their experts.

pub mod attention;
pub mod beside;
pub mod buffers;
pub mod delta_net;
pub mod driver;
mod elementwise;
pub mod executor;
pub mod experts;
pub mod flash;
pub mod forced;
pub mod foresight;
pub mod kv_cache;
pub mod loader;
pub mod matmul;
pub mod mla;
pub mod model;
pub mod placed;
pub mod prepared;
pub mod reference;
pub mod remote;
pub mod rope;
pub mod route;
pub mod sequences;
pub mod slots;
pub mod step_ops;
pub mod threads;
