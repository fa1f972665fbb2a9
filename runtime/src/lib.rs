//! Files, memory, kernels, devices, threads and tokens: carries the planner's decisions out.
//!
//! * [`atomic_file`]: output that appears whole or not at all.
//! * [`gguf`]: GGUF files, read through a memory map and written.
//! * [`safetensors`]: Hugging Face weight folders.
//! * [`import`]: file metadata to [`tierwise_cost::model::ModelSpec`].
//! * [`convert`]: a model in other formats, as one GGUF file.
//! * [`quant`]: block formats, one file each: layout, scalar reference.
//! * [`kernels`]: CPU kernels chosen at run time; every one has its scalar twin in [`quant`].
//! * [`tokenizer`], [`chat`], [`sampler`]: text in, tokens out, text out.
//! * [`exec`]: runs the operation list of [`tierwise_cost::op`] on the CPU.
//! * [`hybrid`]: runs it on a device, with routed experts on device and CPU at the same time.
//! * [`memory`]: regions on NUMA nodes.
//! * [`session`]: a loaded model with its engine: prefill, decode, generate.
//! * [`parallel`]: experts over several ranks, which exchange tokens and weights.
//! * [`synth`]: random-weight files in the shape of a real model.
//! * [`trace`]: routing traces from files; [`torch_file`], [`permute`]: files for other engines.
//! * [`probe`]: a quick look at this machine; [`backend`]: which devices it has; [`doctor`]: findings and hints.

pub mod atomic_file;
pub mod backend;
pub mod chat;
pub mod convert;
pub mod doctor;
pub mod error;
pub mod exec;
pub mod gguf;
pub mod hybrid;
pub mod import;
pub mod kernels;
pub mod memory;
pub mod parallel;
pub mod permute;
pub mod permute_folder;
pub mod probe;
pub mod quant;
pub mod safetensors;
pub mod sampler;
pub mod session;
pub mod synth;
pub mod tokenizer;
pub mod torch_file;
pub mod trace;

pub use error::RuntimeError;
