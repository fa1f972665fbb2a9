//! A back-end that starts the CUDA kernels in an emulator: a program made of the kernels and `shaders/tests/emulator.h`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, OnceLock};
use tierwise_runtime::RuntimeError;
use tierwise_runtime::backend::cuda::graphs::{GraphCounts, GraphTarget, Graphs};
use tierwise_runtime::backend::cuda::launch::{self, Launch, Target};
use tierwise_runtime::backend::device::{BufferId, Copier, DeviceBackend, DeviceInfo, View};
use tierwise_runtime::backend::op::DeviceOp;
use tierwise_runtime::error::Result;
use tierwise_shaders::cuda::{CUDA_FORMATS, CudaModule};

const ALIGNMENT_BYTES: u64 = 256;

/// The emulator's process and what it holds.
pub struct Emulated {
    info: DeviceInfo,
    to: BufWriter<ChildStdin>,
    from: BufReader<ChildStdout>,
    child: Child,
    /// Address and size.
    buffers: Vec<(u64, u64)>,
    scratch: BTreeMap<u64, u64>,
    /// Scratch memory has one size, as a device's has after some steps.
    scratch_bytes: Option<u64>,
    /// What repeats becomes a list that stands for a graph on the device.
    graphs: Graphs<Vec<Launch>>,
}

/// The text of the emulator: every module in its own namespace, and a table of all kernels.
fn program() -> String {
    let header = concat!(env!("CARGO_MANIFEST_DIR"), "/../shaders/tests/emulator.h");
    let mut text = format!("#include \"{header}\"\n");
    // The longest prelude holds the other ones.
    text += &CudaModule::Weights(CUDA_FORMATS[0]).prelude();
    let mut table = String::from("int main() {\n");
    for module in CudaModule::all() {
        let name = module.name();
        // Names and shared memory are defined anew for every format.
        for define in module.defines().lines() {
            let word = define.split_whitespace().nth(1).expect("a #define names something");
            let _ = writeln!(text, "#undef {word}");
        }
        let _ = writeln!(text, "#undef EXACT\n{}namespace module_{name} {{\n{}}}", module.defines(), module.body());
        for kernel in module.kernels() {
            let entry = kernel.entry_point;
            let _ = writeln!(table, "    add(\"{name}/{entry}\", module_{name}::{entry});");
        }
    }
    text + &table + "    return serve();\n}\n"
}

/// Compiles the emulator once per process, and not at all if the compiled one is of the same text.
fn build() -> Option<&'static Path> {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    BUILT
        .get_or_init(|| {
            if Command::new("c++").arg("--version").output().is_err() {
                println!("skipped: no C++ compiler (apt install g++)");
                return None;
            }
            let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
            let (source, binary) = (folder.join("cuda_emulator.cpp"), folder.join("cuda_emulator"));
            let text = program();
            let header = include_str!("../../../shaders/tests/emulator.h");
            let whole = format!("{text}\n/*{}*/\n", header.replace("*/", ""));
            if std::fs::read_to_string(&source).is_ok_and(|old| old == whole) && binary.exists() {
                return Some(binary);
            }
            std::fs::write(&source, &whole).expect("the target folder is writable");
            let made = folder.join(format!("cuda_emulator.{}", std::process::id()));
            let flags = ["-std=c++17", "-O1", "-w", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-o"];
            let output = Command::new("c++").args(flags).arg(&made).arg(&source).output().expect("the compiler starts");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            std::fs::rename(&made, &binary).expect("the target folder is writable");
            Some(binary)
        })
        .as_deref()
}

impl Emulated {
    /// Starts the emulator, `None` without a C++ compiler.
    pub fn open() -> Option<Self> {
        let mut child = Command::new(build()?).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the emulator starts");
        let info = DeviceInfo {
            backend: "cuda",
            name: "emulator".into(),
            driver: String::new(),
            free_bytes: None,
            max_buffer_bytes: 1 << 30,
            max_expert_bytes: 1 << 30,
            alignment_bytes: ALIGNMENT_BYTES,
            formats: CUDA_FORMATS.to_vec(),
            features: vec!["factors rounded to bf16 for many tokens".into()],
        };
        Some(Self {
            info,
            to: BufWriter::new(child.stdin.take().expect("piped")),
            from: BufReader::new(child.stdout.take().expect("piped")),
            child,
            buffers: Vec::new(),
            scratch: BTreeMap::new(),
            scratch_bytes: None,
            graphs: Graphs::default(),
        })
    }

    /// Gives scratch memory one size.
    pub fn fix_scratch(&mut self, bytes: u64) {
        self.scratch_bytes = Some(bytes);
    }

    /// What became of launches that repeat.
    pub fn graphs(&self) -> GraphCounts {
        self.graphs.counts()
    }

    fn send(&mut self, command: u32, parts: &[&[u8]]) {
        let mut send = || -> std::io::Result<()> {
            self.to.write_all(&command.to_le_bytes())?;
            parts.iter().try_for_each(|p| self.to.write_all(p))?;
            self.to.flush()
        };
        send().expect("the emulator runs");
    }

    fn receive<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.from.read_exact(&mut bytes).expect("the emulator goes on (its message is above)");
        bytes
    }

    fn allocate(&mut self, bytes: u64) -> u64 {
        self.send(1, &[&bytes.to_le_bytes()]);
        u64::from_le_bytes(self.receive())
    }

    fn launch(&mut self, l: &Launch) {
        let name = format!("{}/{}", l.module.name(), l.kernel.entry_point);
        let shape: Vec<u8> = l.grid.iter().chain(&[l.kernel.threads, l.shared_bytes]).flat_map(|x| x.to_le_bytes()).collect();
        let arguments: Vec<u8> = l.arguments.iter().flat_map(|a| a.bits().to_le_bytes()).collect();
        let (name_len, count) = (name.len() as u32, l.arguments.len() as u32);
        self.send(4, &[&name_len.to_le_bytes(), name.as_bytes(), &shape, &count.to_le_bytes(), &arguments]);
        assert_eq!(self.receive(), [0; 4], "{name}");
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        // It only reads and writes pipes: nothing is lost.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Target for Emulated {
    fn address(&self, view: View, bytes: u64, what: &str) -> Result<u64> {
        let (address, size) = self.buffers[view.buffer.0 as usize];
        assert!(bytes <= view.bytes && view.offset_bytes + view.bytes <= size, "{what} of {bytes} bytes in {view:?}");
        Ok(address + view.offset_bytes)
    }

    fn scratch(&mut self, bytes: u64) -> Result<u64> {
        let bytes = self.scratch_bytes.map_or(bytes, |most| most.max(bytes));
        if let Some(address) = self.scratch.get(&bytes) {
            return Ok(*address);
        }
        let address = self.allocate(bytes);
        self.scratch.insert(bytes, address);
        Ok(address)
    }

    fn multiprocessors(&self) -> u32 {
        6
    }

    fn max_shared_bytes(&self) -> u32 {
        // That of compute capability 8.0: latent attention over an f32 cache needs more than consumer cards have.
        166_912
    }
}

impl GraphTarget for Emulated {
    type Graph = Vec<Launch>;

    fn build(&mut self, launches: &[Launch]) -> Result<Vec<Launch>> {
        Ok(launches.to_vec())
    }

    fn change(&mut self, graph: &mut Vec<Launch>, node: usize, launch: &Launch) -> Result<()> {
        graph[node] = launch.clone();
        Ok(())
    }

    fn run(&mut self, graph: &Vec<Launch>) -> Result<()> {
        graph.iter().for_each(|l| self.launch(l));
        Ok(())
    }

    fn start(&mut self, launch: &Launch) -> Result<()> {
        self.launch(launch);
        Ok(())
    }
}

impl DeviceBackend for Emulated {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn alloc(&mut self, bytes: u64, _what: &str) -> Result<BufferId> {
        let address = self.allocate(bytes);
        self.buffers.push((address, bytes));
        Ok(BufferId(self.buffers.len() as u32 - 1))
    }

    fn allocated_bytes(&self) -> u64 {
        self.buffers.iter().map(|b| b.1).sum()
    }

    fn write(&mut self, to: View, bytes: &[u8]) -> Result<()> {
        let address = self.buffers[to.buffer.0 as usize].0 + to.offset_bytes;
        self.send(2, &[&address.to_le_bytes(), &(bytes.len() as u64).to_le_bytes(), bytes]);
        Ok(())
    }

    fn submit(&mut self, ops: &[DeviceOp]) -> Result<()> {
        let sizes: Vec<u64> = self.buffers.iter().map(|b| b.1).collect();
        let mut launches = Vec::new();
        for op in ops {
            op.check(ALIGNMENT_BYTES, CUDA_FORMATS, |b| sizes.get(b.0 as usize).copied())?;
            launch::plan(op, self, &mut launches)?;
        }
        let mut graphs = std::mem::take(&mut self.graphs);
        let started = graphs.submit(&launches, self);
        self.graphs = graphs;
        started
    }

    fn read(&mut self, parts: &mut [(View, &mut [u8])]) -> Result<()> {
        for (view, out) in parts {
            let address = self.buffers[view.buffer.0 as usize].0 + view.offset_bytes;
            self.send(3, &[&address.to_le_bytes(), &(out.len() as u64).to_le_bytes()]);
            self.from.read_exact(out).map_err(|e| RuntimeError::Device { device: "cuda", reason: e.to_string() })?;
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        Ok(())
    }

    fn copier(&self) -> Arc<dyn Copier> {
        unreachable!("the emulator is tested without copies beside it")
    }
}
