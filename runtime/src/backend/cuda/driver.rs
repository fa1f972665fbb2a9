//! The CUDA back-end: one stream for operations, launched as [`super::launch`] plans them.

use super::copier::{CudaCopier, STAGING_BYTES};
use super::graph_exec::CudaGraph;
use super::graphs::{GraphCounts, GraphTarget, Graphs};
use super::kernels::Kernels;
use super::launch::{self, Argument, EXACT_TOKENS, Launch, Target};
use super::memory::{ALIGNMENT_BYTES, Counter, DeviceBlock, Pinned};
use super::{Buffers, Options, device_error, place, refuse};
use crate::backend::device::{BufferId, Copier, DeviceBackend, DeviceInfo, View};
use crate::backend::op::DeviceOp;
use crate::error::Result;
use cudarc::driver::sys::{CUdevice_attribute_enum as Attribute, CUevent_flags};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result};
use std::ffi::c_void;
use std::sync::{Arc, PoisonError};
use tierwise_shaders::cuda::{CUDA_FORMATS, CudaModule};

/// Page-locked memory through which small writes and reads go, so that they do not stop the stream.
const SMALL_BYTES: usize = 4 << 20;

/// See the module.
pub struct CudaBackend {
    info: DeviceInfo,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    kernels: Kernels,
    buffers: Buffers,
    blocks: Vec<DeviceBlock>,
    scratch: Option<DeviceBlock>,
    allocated: Counter,
    copier: Arc<CudaCopier>,
    writes: Pinned,
    /// What of `writes` copies may still read.
    written: usize,
    reads: Pinned,
    multiprocessors: u32,
    max_shared_bytes: u32,
    launches: Vec<Launch>,
    graphs: Graphs<CudaGraph>,
    /// The scratch memory was replaced so often.
    scratch_changes: u32,
}

// SAFETY: the function handles in `kernels` and those in `graphs` belong to the context, not to a thread; every method makes the context current first.
unsafe impl Send for CudaBackend {}

impl CudaBackend {
    /// Opens the device of this number.
    ///
    /// # Errors
    /// When it is not there, is too old, or the driver refuses.
    pub fn open(ordinal: usize, options: Options) -> Result<Self> {
        let failed = |e| device_error("open the device", e);
        let count = CudaContext::device_count().map_err(failed)?;
        if ordinal >= usize::try_from(count).unwrap_or(0) {
            return Err(refuse(format!("device {ordinal} of {count}")));
        }
        let context = CudaContext::new(ordinal).map_err(failed)?;
        let (major, minor) = context.compute_capability().map_err(failed)?;
        let architecture = (10 * major + minor) as u32;
        if architecture < 80 {
            return Err(refuse(format!("compute capability {major}.{minor} is below 8.0; use --device wgpu")));
        }
        let attribute = |a| context.attribute(a).map(|x| x as u32).map_err(failed);
        let max_shared_bytes = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let (free, total) = context.mem_get_info().map_err(failed)?;
        let info = DeviceInfo {
            backend: "cuda",
            name: context.name().map_err(failed)?,
            driver: format!("CUDA {}, compute capability {major}.{minor}", driver_version()),
            free_bytes: Some(free as u64),
            max_buffer_bytes: total as u64,
            max_expert_bytes: 16 * u64::from(u32::MAX),
            alignment_bytes: ALIGNMENT_BYTES,
            formats: CUDA_FORMATS.to_vec(),
            features: vec![
                "tensor cores".into(),
                format!("factors rounded to bf16 for more than {EXACT_TOKENS} tokens (never F32 weights)"),
            ],
        };
        let buffers = Buffers::default();
        Ok(Self {
            stream: context.new_stream().map_err(failed)?,
            kernels: Kernels::new(options, architecture, max_shared_bytes),
            copier: Arc::new(CudaCopier::new(&context, Arc::clone(&buffers))?),
            writes: Pinned::new(&context, SMALL_BYTES)?,
            reads: Pinned::new(&context, SMALL_BYTES)?,
            info,
            context,
            buffers,
            blocks: Vec::new(),
            scratch: None,
            allocated: Counter::default(),
            written: 0,
            multiprocessors,
            max_shared_bytes,
            launches: Vec::new(),
            graphs: Graphs::default(),
            scratch_changes: 0,
        })
    }

    /// Host memory that is page-locked for copies.
    pub fn locked_host_bytes(&self) -> u64 {
        STAGING_BYTES + 2 * SMALL_BYTES as u64
    }

    /// Operations per second of the tensor cores on bf16 with nothing else to do (`mma`, not the Hopper-only `wgmma`).
    ///
    /// # Errors
    /// When the device is lost.
    pub fn measured_mma_rate(&mut self) -> Result<f64> {
        const ROUNDS: u32 = 20_000;
        self.bind()?;
        let blocks = 2 * self.multiprocessors;
        let module = CudaModule::Elementwise;
        let kernel = module.kernel("mma_rate").expect("registered");
        let out = Argument::Pointer(self.scratch(u64::from(blocks * kernel.threads) * 4)?);
        let arguments = vec![out, Argument::U32(ROUNDS)];
        let launch = Launch { module, kernel, grid: [blocks, 1, 1], shared_bytes: 0, arguments };
        self.start_one(&launch)?;
        let ms = self.timed(|b| b.start_one(&launch))?;
        let products = f64::from(blocks) * f64::from(kernel.threads / 32) * 8.0 * f64::from(ROUNDS);
        Ok(products * 4096.0 / (f64::from(ms) * 1e-3))
    }

    /// Milliseconds that operations take on the device, waiting for them.
    ///
    /// # Errors
    /// When an operation cannot be or the device is lost.
    pub fn timed_ms(&mut self, ops: &[DeviceOp]) -> Result<f32> {
        self.timed(|b| b.submit(ops))
    }

    fn timed(&mut self, run: impl FnOnce(&mut Self) -> Result<()>) -> Result<f32> {
        let failed = |e| device_error("measure time", e);
        self.bind()?;
        let flags = Some(CUevent_flags::CU_EVENT_DEFAULT);
        let (start, end) = (self.context.new_event(flags).map_err(failed)?, self.context.new_event(flags).map_err(failed)?);
        start.record(&self.stream).map_err(failed)?;
        run(self)?;
        end.record(&self.stream).map_err(failed)?;
        end.synchronize().map_err(failed)?;
        start.elapsed_ms(&end).map_err(failed)
    }

    /// Milliseconds that `repeats` copies of a part to another one of its size take.
    ///
    /// # Errors
    /// When a part does not exist or the device is lost.
    pub fn timed_copy_ms(&mut self, from: View, to: View, repeats: u32) -> Result<f32> {
        let failed = |e| device_error("measure a copy", e);
        let source = place(&self.buffers, from, from.bytes, "source")?;
        let target = place(&self.buffers, to, from.bytes, "target")?;
        self.timed(|b| {
            (0..repeats).try_for_each(|_| {
                // SAFETY: both parts were just checked to have the bytes.
                unsafe { result::memcpy_dtod_async(target, source, from.bytes as usize, b.stream.cu_stream()) }.map_err(failed)
            })
        })
    }

    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| device_error("use the context", e))
    }

    /// What became of launches that repeat, and why none of them become graphs, if so.
    pub fn graphs(&self) -> (GraphCounts, Option<&str>) {
        (self.graphs.counts(), self.graphs.refused())
    }

    fn start_one(&mut self, l: &Launch) -> Result<()> {
        let function = self.kernels.function(l.module, l.kernel)?;
        let mut values: Vec<u64> = l.arguments.iter().map(|a| a.bits()).collect();
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|v| std::ptr::from_mut(v).cast()).collect();
        let [x, y, z] = l.grid;
        // SAFETY: the function is loaded; the arguments have the number and types of its parameters (`Planner::launch` compares them with the
        // registry, and the registry's tests compare that with the source); the driver copies them before it returns. What the kernel
        // reads and writes are parts of live blocks, checked when the launch was planned.
        unsafe {
            result::launch_kernel(
                function,
                (x, y, z),
                (l.kernel.threads, 1, 1),
                l.shared_bytes,
                self.stream.cu_stream(),
                &mut pointers,
            )
        }
        .map_err(|e| device_error(&format!("start {} over {:?}", l.kernel.entry_point, l.grid), e))
    }

    fn check(&self, op: &DeviceOp) -> Result<()> {
        let buffers = self.buffers.read().unwrap_or_else(PoisonError::into_inner);
        op.check(ALIGNMENT_BYTES, CUDA_FORMATS, |b| buffers.get(b.0 as usize).map(|x| x.1)).map(|_| ())
    }
}

fn driver_version() -> String {
    let mut version = 0;
    // SAFETY: writes one integer.
    let code = unsafe { cudarc::driver::sys::cuDriverGetVersion(&raw mut version) };
    if code.result().is_ok() { format!("{}.{}", version / 1000, version % 1000 / 10) } else { "unknown".into() }
}

impl CudaBackend {
    /// Plans operations that are submitted together.
    fn plan(&mut self, ops: &[DeviceOp], launches: &mut Vec<Launch>) -> Result<()> {
        ops.iter().try_for_each(|op| self.check(op))?;
        loop {
            let changes = self.scratch_changes;
            launches.clear();
            for op in ops {
                launch::plan(op, self, launches)?;
            }
            // Launches that were planned for the old scratch memory would use what is freed; it only grows, so this ends.
            if self.scratch_changes == changes {
                return Ok(());
            }
        }
    }
}

impl GraphTarget for CudaBackend {
    type Graph = CudaGraph;

    fn build(&mut self, launches: &[Launch]) -> Result<CudaGraph> {
        let mut with_functions = Vec::with_capacity(launches.len());
        for l in launches {
            with_functions.push((l, self.kernels.function(l.module, l.kernel)?));
        }
        CudaGraph::new(&self.context, &with_functions)
    }

    fn change(&mut self, graph: &mut CudaGraph, node: usize, launch: &Launch) -> Result<()> {
        graph.change(node, launch, self.kernels.function(launch.module, launch.kernel)?)
    }

    fn run(&mut self, graph: &CudaGraph) -> Result<()> {
        graph.launch(self.stream.cu_stream())
    }

    fn start(&mut self, launch: &Launch) -> Result<()> {
        self.start_one(launch)
    }
}

impl Target for CudaBackend {
    fn address(&self, view: View, bytes: u64, what: &str) -> Result<u64> {
        place(&self.buffers, view, bytes, what)
    }

    fn scratch(&mut self, bytes: u64) -> Result<u64> {
        if let Some(block) = self.scratch.as_ref().filter(|b| b.bytes >= bytes) {
            return Ok(block.address);
        }
        // Operations under way may use the old one.
        self.wait()?;
        if let Some(old) = self.scratch.take() {
            self.allocated.remove(old.bytes);
        }
        let bytes = bytes.next_multiple_of(1 << 20);
        let block = DeviceBlock::new(&self.context, bytes, "scratch memory")?;
        self.allocated.add(bytes);
        let address = block.address;
        self.scratch_changes += 1;
        self.scratch = Some(block);
        Ok(address)
    }

    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    fn max_shared_bytes(&self) -> u32 {
        self.max_shared_bytes
    }
}

impl DeviceBackend for CudaBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn alloc(&mut self, bytes: u64, what: &str) -> Result<BufferId> {
        let block = DeviceBlock::new(&self.context, bytes, what)?;
        let mut buffers = self.buffers.write().unwrap_or_else(PoisonError::into_inner);
        let id = u32::try_from(buffers.len()).map_err(|_| refuse("too many blocks".into()))?;
        buffers.push((block.address, bytes));
        self.allocated.add(bytes.next_multiple_of(ALIGNMENT_BYTES));
        self.blocks.push(block);
        Ok(BufferId(id))
    }

    fn allocated_bytes(&self) -> u64 {
        self.allocated.get()
    }

    fn write(&mut self, to: View, bytes: &[u8]) -> Result<()> {
        let failed = |e| device_error("write", e);
        self.bind()?;
        let address = place(&self.buffers, to, bytes.len() as u64, "a write")?;
        for (i, part) in bytes.chunks(SMALL_BYTES).enumerate() {
            if self.written + part.len() > SMALL_BYTES {
                self.stream.synchronize().map_err(failed)?;
                self.written = 0;
            }
            let staged = &mut self.writes.bytes()[self.written..][..part.len()];
            staged.copy_from_slice(part);
            // SAFETY: the part has room (`place`); the staged bytes are not written again before the stream was waited for.
            unsafe { result::memcpy_htod_async(address + (i * SMALL_BYTES) as u64, staged, self.stream.cu_stream()) }
                .map_err(failed)?;
            self.written += part.len();
        }
        Ok(())
    }

    fn submit(&mut self, ops: &[DeviceOp]) -> Result<()> {
        self.bind()?;
        let mut launches = std::mem::take(&mut self.launches);
        let mut graphs = std::mem::take(&mut self.graphs);
        let had = graphs.refused().is_some();
        let planned = self.plan(ops, &mut launches);
        let started = planned.and_then(|()| graphs.submit(&launches, self));
        if let Some(reason) = graphs.refused().filter(|_| !had) {
            eprintln!("cuda: kernels are launched one by one, the device refuses graphs ({reason})");
        }
        (self.launches, self.graphs) = (launches, graphs);
        started
    }

    fn read(&mut self, parts: &mut [(View, &mut [u8])]) -> Result<()> {
        let failed = |e| device_error("read", e);
        self.bind()?;
        for (view, out) in parts {
            let address = place(&self.buffers, *view, out.len() as u64, "a read")?;
            for (i, part) in out.chunks_mut(SMALL_BYTES).enumerate() {
                let staged = &mut self.reads.bytes()[..part.len()];
                // SAFETY: the part has the bytes (`place`), and the stream is waited for before `staged` is read or written again.
                unsafe { result::memcpy_dtoh_async(staged, address + (i * SMALL_BYTES) as u64, self.stream.cu_stream()) }
                    .map_err(failed)?;
                self.stream.synchronize().map_err(failed)?;
                part.copy_from_slice(staged);
            }
        }
        self.written = 0;
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        self.bind()?;
        let done: std::result::Result<(), DriverError> = self.stream.synchronize();
        self.written = 0;
        done.map_err(|e| device_error("compute", e))
    }

    fn copier(&self) -> Arc<dyn Copier> {
        Arc::clone(&self.copier) as Arc<dyn Copier>
    }
}

impl Drop for CudaBackend {
    fn drop(&mut self) {
        // Blocks and page-locked memory are freed after this; nothing may use them any more.
        let _ = self.wait();
        self.graphs.clear();
        self.kernels.unload();
    }
}
