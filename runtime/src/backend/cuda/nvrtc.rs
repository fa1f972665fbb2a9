//! NVIDIA's run-time compiler: CUDA C++ text to machine code (cubin), with what each kernel takes of a multiprocessor.
//!
//! The library (`libnvrtc`, with `libnvrtc-builtins` beside it) is opened by name or from a folder when it is first wanted. It comes with the
//! toolkit and as the Python wheel `nvidia-cuda-nvrtc`. Machine code rather than PTX, because a driver older than the compiler refuses
//! its PTX but runs its code. Functions and their types: the NVRTC manual, "User Interface".

use super::refuse;
use crate::error::{Result, RuntimeError};
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr;

/// Options of every compilation; part of what names a compiled file.
pub const OPTIONS: &[&str] = &["--std=c++17", "-diag-suppress=177", "--ptxas-options=-v"];

type Program = *mut c_void;

/// The library.
#[derive(Debug)]
pub struct Nvrtc {
    library: Library,
    /// Held open: the compiler finds it because it is loaded already.
    _builtins: Option<Library>,
    /// Where it was found.
    pub path: PathBuf,
}

/// Machine code with the assembler's report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compiled {
    /// The code.
    pub cubin: Vec<u8>,
    /// A line per kernel.
    pub usage: Vec<Usage>,
    /// All that the compiler said.
    pub log: String,
}

/// What a kernel takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// The kernel.
    pub entry_point: String,
    /// Registers per thread.
    pub registers: u32,
    /// Bytes per thread that did not fit the registers, stores and loads.
    pub spill_bytes: u32,
    /// Bytes of stack per thread.
    pub stack_bytes: u32,
}

impl Nvrtc {
    /// Opens the library in `folder`, or where this program or the system has it.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(folder: Option<&Path>) -> Result<Self> {
        if let Some(folder) = folder {
            return Self::open_in(folder).ok_or_else(|| refuse(format!("no libnvrtc.so in {}", folder.display())));
        }
        let beside = std::env::current_exe().ok().and_then(|p| p.parent().map(Path::to_path_buf));
        if let Some(found) = beside.and_then(|folder| Self::open_in(&folder)) {
            return Ok(found);
        }
        for name in ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"] {
            // SAFETY: opening NVIDIA's library runs its initialisers, as any use of it would.
            if let Ok(library) = unsafe { Library::new(name) } {
                return Ok(Self { library, _builtins: None, path: name.into() });
            }
        }
        Err(refuse(
            "the CUDA kernels must be compiled and libnvrtc was not found; give a folder of compiled kernels, install the CUDA toolkit \
             or the Python package nvidia-cuda-nvrtc"
                .into(),
        ))
    }

    fn open_in(folder: &Path) -> Option<Self> {
        let named = |start: &str| {
            let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
                .ok()?
                .filter_map(|e| Some(e.ok()?.path()))
                .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(start)))
                .collect();
            found.sort();
            found.pop()
        };
        let (builtins, path) = (named("libnvrtc-builtins.so"), named("libnvrtc.so")?);
        // SAFETY: as above; the builtins first, since the compiler asks for them by a name that only the loader's list resolves.
        let builtins = builtins.and_then(|p| unsafe { Library::new(p) }.ok());
        // SAFETY: as above.
        let library = unsafe { Library::new(&path) }.ok()?;
        Some(Self { library, _builtins: builtins, path })
    }

    /// Compiles for one architecture, e.g. 90 for `sm_90`.
    ///
    /// # Errors
    /// When the text has errors or the compiler does not know the architecture.
    pub fn compile(&self, name: &str, source: &str, architecture: u32) -> Result<Compiled> {
        let text = |s: &str| CString::new(s).map_err(|_| refuse(format!("{name}: a zero byte in the source")));
        let (source, file) = (text(source)?, text(&format!("{name}.cu"))?);
        let architecture = text(&format!("--gpu-architecture=sm_{architecture}"))?;
        let mut options = vec![architecture];
        for option in OPTIONS {
            options.push(text(option)?);
        }
        let options: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let mut program: Program = ptr::null_mut();
        // SAFETY: the symbols have these types in every version since 11.1; strings end with zero and outlive the calls; `program` is
        // destroyed once, after its last use; buffers have the sizes that the library asks for.
        unsafe {
            let create: Create = self.symbol(b"nvrtcCreateProgram\0")?;
            let compile: CompileProgram = self.symbol(b"nvrtcCompileProgram\0")?;
            let destroy: Destroy = self.symbol(b"nvrtcDestroyProgram\0")?;
            let cubin_size: GetSize = self.symbol(b"nvrtcGetCUBINSize\0")?;
            let cubin: GetBytes = self.symbol(b"nvrtcGetCUBIN\0")?;
            let log_size: GetSize = self.symbol(b"nvrtcGetProgramLogSize\0")?;
            let log: GetBytes = self.symbol(b"nvrtcGetProgramLog\0")?;
            self.demand(
                "create a program",
                create(&raw mut program, source.as_ptr(), file.as_ptr(), 0, ptr::null(), ptr::null()),
            )?;
            let made = compile(program, options.len() as c_int, options.as_ptr());
            let bytes = |size: GetSize, get: GetBytes| {
                let mut count = 0;
                self.demand("measure its result", size(program, &raw mut count))?;
                let mut bytes = vec![0u8; count];
                self.demand("give its result", get(program, bytes.as_mut_ptr().cast()))?;
                Ok::<_, RuntimeError>(bytes)
            };
            let log = bytes(log_size, log).map(|b| String::from_utf8_lossy(&b).trim_end_matches('\0').to_string());
            let result = log.and_then(|log| {
                self.demand("compile", made).map_err(|e| refuse(format!("kernels of {name}: {e}\n{log}")))?;
                Ok(Compiled { cubin: bytes(cubin_size, cubin)?, usage: usage(&log), log })
            });
            destroy(&raw mut program);
            result
        }
    }

    /// # Safety
    /// `T` is the type of the function of that name.
    unsafe fn symbol<T: Copy>(&self, name: &[u8]) -> Result<T> {
        // SAFETY: the caller's promise.
        unsafe { self.library.get::<T>(name) }
            .map(|s| *s)
            .map_err(|e| refuse(format!("{} lacks a function: {e}", self.path.display())))
    }

    fn demand(&self, what: &str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the function takes a code and returns a constant string.
        let message = unsafe {
            self.symbol::<unsafe extern "C" fn(c_int) -> *const c_char>(b"nvrtcGetErrorString\0")
                .map(|f| CStr::from_ptr(f(code)).to_string_lossy().into_owned())
        };
        Err(refuse(format!("{} could not {what}: {}", self.path.display(), message.unwrap_or_else(|_| code.to_string()))))
    }
}

type Create =
    unsafe extern "C" fn(*mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char) -> c_int;
type CompileProgram = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;
type GetSize = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type GetBytes = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// The assembler's report: per kernel a line with its name, one with stack and spills, one with registers.
fn usage(log: &str) -> Vec<Usage> {
    let number_before = |line: &str, word: &str| -> u32 {
        let before = line.split(word).next().unwrap_or_default();
        before.split_whitespace().next_back().and_then(|n| n.parse().ok()).unwrap_or(0)
    };
    let mut found: Vec<Usage> = Vec::new();
    for line in log.lines() {
        if let Some((_, name)) = line.split_once("Function properties for ") {
            found.push(Usage { entry_point: name.trim().into(), registers: 0, spill_bytes: 0, stack_bytes: 0 });
        } else if let Some(last) = found.last_mut() {
            if line.contains("bytes stack frame") {
                last.stack_bytes = number_before(line, "bytes stack frame");
                last.spill_bytes = number_before(line, "bytes spill stores") + number_before(line, "bytes spill loads");
            } else if line.contains(" registers") && last.registers == 0 {
                last.registers = number_before(line, "registers");
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_assemblers_report_is_read() {
        let log = "ptxas info    : Function properties for axpy\n    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n\
                   ptxas info    : Used 10 registers, used 0 barriers\n";
        let expected = Usage { entry_point: "axpy".into(), registers: 10, spill_bytes: 16, stack_bytes: 8 };
        assert_eq!(usage(log), [expected]);
    }
}
