//! Routed experts over several ranks (expert parallelism), on the kernels and sessions of one process.
//!
//! Every rank has the model's other weights, sequences of its own, and some of the experts. In each layer with experts the ranks tell each
//! other how many tokens they have for whom; all decide alike what happens ([`tierwise_planner::balance::decide`]: placement, exact split, copies
//! of experts); weights move if that was decided; tokens go to who computes them and their results come back; each rank sums its
//! own, in the order of the choices. There is no coordinator.
//!
//! * [`transport`]: messages between ranks; [`channels`]: ranks as threads of one process; `mpi`: processes, feature `mpi`.
//! * [`dispatch`]: one layer; [`message`]: what travels; [`copies`]: experts that other ranks sent.
//! * [`session`]: a session of which all ranks compute the experts; [`link`]: how fast messages are; [`statistics`]: what was done.

pub mod channels;
pub mod copies;
pub mod dispatch;
pub mod link;
pub mod message;
#[cfg(feature = "mpi")]
pub mod mpi;
pub mod session;
pub mod statistics;
pub mod transport;

pub use channels::run_threads;
pub use session::{ParallelConfig, ParallelSession};
pub use statistics::ParallelStatistics;
pub use transport::Transport;
