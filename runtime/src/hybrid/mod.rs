//! Runs the operation list of [`tierwise_cost::op`] on a device, with routed experts on device and CPU at the same time.
//!
//! Everything that is not routed runs on the device. A layer's routed experts are computed where the planner's engine says: waves of
//! the main processor are submitted to the device, waves of the CPU are computed meanwhile from the host's copy, and their weighted sum
//! is added. Experts are copied into the device's slots by [`crate::exec::loader`]'s threads beside both.
//!
//! * [`executor`]: the interpreter of the list; `mixing`: attention; [`routed`]: routed experts. * [`memory`]: what is allocated, against
//!   the plan; [`weights`], [`activations`], [`experts`]: what for. * `stream`: operations on their way to the device.

pub mod activations;
pub mod executor;
pub mod experts;
mod groups;
pub mod memory;
mod mixing;
pub mod routed;
pub mod stream;
pub mod weights;
