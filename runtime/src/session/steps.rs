//! Who computes a session's steps: the CPU alone, or a device with the CPU's help.

use crate::error::{Result, RuntimeError};
use crate::exec::driver::Driver;
use crate::exec::executor::{CapturedRouting, Executor, LogitsSink};
use crate::exec::kv_cache::KvCache;
use crate::exec::loader::DevicePlace;
use crate::exec::model::Model;
use crate::exec::remote::RemoteExperts;
use crate::exec::sequences::{Sequence, SequenceId, SequenceTokens};
use crate::hybrid::executor::HybridExecutor;
use std::sync::Arc;
use tierwise_planner::budget;
use tierwise_planner::routing::RoutingTrace;

/// The executor of a session.
pub enum Steps {
    /// Everything on the CPU.
    Cpu(Box<Executor>),
    /// All but the CPU's experts on a device.
    Device(Box<HybridExecutor>),
}

impl Steps {
    /// As [`Executor::step`].
    ///
    /// # Errors
    /// As [`Executor::step`].
    pub fn step(&mut self, model: &Model, driver: &mut Driver, parts: &[SequenceTokens<'_>], sink: LogitsSink<'_>) -> Result<()> {
        match self {
            Self::Cpu(e) => e.step(model, driver, parts, sink),
            Self::Device(e) => match parts {
                [SequenceTokens { sequence: SequenceId::FIRST, tokens, wanted }] => e.step(model, driver, tokens, *wanted, sink),
                _ => Err(several_on_a_device()),
            },
        }
    }

    /// Tokens in a sequence's cache; `None` when there is no such sequence.
    pub fn len(&self, sequence: SequenceId) -> Option<usize> {
        match self {
            Self::Cpu(e) => e.sequences().kv(sequence).map(KvCache::len),
            Self::Device(e) => (sequence == SequenceId::FIRST).then(|| e.kv().len()),
        }
    }

    /// Tokens the cache of a sequence can hold.
    pub const fn context(&self) -> usize {
        match self {
            Self::Cpu(e) => e.sequences().context(),
            Self::Device(e) => e.kv().context(),
        }
    }

    /// Bytes reserved for keys and values in host memory, and on a device.
    pub fn kv_bytes(&self) -> (u64, u64) {
        match self {
            Self::Cpu(e) => (e.sequences().all().iter().map(|s| s.kv.bytes()).sum(), 0),
            Self::Device(e) => (0, e.memory().iter().filter(|l| l.name == budget::KV).map(|l| l.allocated.0).sum()),
        }
    }

    /// Forgets every position of a sequence from `len` on; `false` when there is no such sequence.
    pub fn truncate(&mut self, sequence: SequenceId, len: usize) -> bool {
        match self {
            Self::Cpu(e) => e.sequences_mut().kv_mut(sequence).map(|kv| kv.truncate(len)).is_some(),
            Self::Device(e) => {
                let known = sequence == SequenceId::FIRST;
                if known {
                    e.kv_mut().truncate(len);
                }
                known
            }
        }
    }

    /// One more sequence, empty.
    ///
    /// # Errors
    /// On a device, or when the system refuses the memory.
    pub fn add_sequence(&mut self, model: &Model) -> Result<SequenceId> {
        match self {
            Self::Cpu(e) => e.sequences_mut().add(model.spec()),
            Self::Device(_) => Err(several_on_a_device()),
        }
    }

    /// Ends a sequence; `false` when there is none of this number, or it is the first.
    pub fn remove_sequence(&mut self, sequence: SequenceId) -> bool {
        match self {
            Self::Cpu(e) => e.sequences_mut().remove(sequence),
            Self::Device(_) => false,
        }
    }

    /// All sequences, the oldest first.
    pub fn sequences(&self) -> Vec<SequenceId> {
        match self {
            Self::Cpu(e) => e.sequences().all().iter().map(Sequence::id).collect(),
            Self::Device(_) => vec![SequenceId::FIRST],
        }
    }

    /// As [`Executor::force_routing`].
    pub fn force_routing(&mut self, trace: Option<(Arc<RoutingTrace>, usize)>) {
        match self {
            Self::Cpu(e) => e.force_routing(trace),
            Self::Device(e) => e.force_routing(trace),
        }
    }

    /// As [`Executor::set_remote`]; false, and nothing changed, on a device.
    pub fn set_remote(&mut self, remote: Option<Box<dyn RemoteExperts>>) -> bool {
        match self {
            Self::Cpu(e) => e.set_remote(remote),
            Self::Device(_) => return false,
        }
        true
    }

    /// As [`Executor::take_routing`].
    pub fn take_routing(&mut self) -> Vec<CapturedRouting> {
        match self {
            Self::Cpu(e) => e.take_routing(),
            Self::Device(e) => e.take_routing(),
        }
    }

    /// The executor on a device, if there is one.
    pub const fn device(&self) -> Option<&HybridExecutor> {
        match self {
            Self::Cpu(_) => None,
            Self::Device(e) => Some(e),
        }
    }

    /// Gate, up and down of an expert on the device, read back.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn read_expert(&mut self, layer: u32, place: DevicePlace) -> Result<[Vec<u8>; 3]> {
        match self {
            Self::Cpu(_) => Ok(Default::default()),
            Self::Device(e) => e.read_expert(layer, place),
        }
    }

    /// Waits for the device, if there is one, so that loads held back for it go on.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn wait(&mut self, driver: &mut Driver) -> Result<()> {
        match self {
            Self::Cpu(_) => Ok(()),
            Self::Device(e) => e.wait(driver),
        }
    }
}

fn several_on_a_device() -> RuntimeError {
    RuntimeError::BadRequest {
        what: "sequences",
        found: "several at once on a device".to_string(),
        expected: "one: several sequences at once are computed on the CPU only (--device cpu)".to_string(),
    }
}
