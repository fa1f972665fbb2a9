//! Compiled kernels: from a folder of compiled ones, from the cache, or compiled now and cached.
//!
//! A file's name says module, architecture and a hash of source and options: code of another version is never taken for this one's.

use super::nvrtc::{Nvrtc, OPTIONS};
use super::{Options, device_error, refuse};
use crate::atomic_file::write_atomic;
use crate::error::{Result, RuntimeError};
use cudarc::driver::{result, sys};
use std::collections::HashMap;
use std::ffi::CString;
use std::path::Path;
use tierwise_shaders::cuda::{CudaKernel, CudaModule};

/// Name of the file of a module's machine code.
pub fn file_name(module: CudaModule, architecture: u32) -> String {
    // FNV-1a, 64 bits: to tell versions apart, not against forgery.
    let text = module.source() + &OPTIONS.concat();
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    format!("{}-{hash:016x}.sm_{architecture}.cubin", module.name())
}

/// Compiles every module for an architecture into a folder; returns the reports.
///
/// # Errors
/// When a source does not compile or the folder cannot be written.
pub fn compile_all(nvrtc: &Nvrtc, architecture: u32, folder: &Path) -> Result<Vec<(CudaModule, super::nvrtc::Compiled)>> {
    std::fs::create_dir_all(folder).map_err(|e| RuntimeError::io("create", folder, e))?;
    let modules = CudaModule::all().into_iter().map(|module| {
        let compiled = nvrtc.compile(&module.name(), &module.source(), architecture)?;
        write_atomic(&folder.join(file_name(module, architecture)), &compiled.cubin)?;
        Ok((module, compiled))
    });
    modules.collect()
}

/// Kernels that are loaded, by module and name.
pub(super) struct Kernels {
    options: Options,
    architecture: u32,
    max_shared_bytes: u32,
    modules: HashMap<CudaModule, sys::CUmodule>,
    functions: HashMap<(CudaModule, &'static str), sys::CUfunction>,
}

impl Kernels {
    pub(super) fn new(options: Options, architecture: u32, max_shared_bytes: u32) -> Self {
        Self { options, architecture, max_shared_bytes, modules: HashMap::new(), functions: HashMap::new() }
    }

    /// Machine code of a module.
    fn code(&self, module: CudaModule) -> Result<Vec<u8>> {
        let name = file_name(module, self.architecture);
        for folder in [&self.options.kernels, &self.options.cache].into_iter().flatten() {
            if let Ok(code) = std::fs::read(folder.join(&name)) {
                return Ok(code);
            }
        }
        let nvrtc = Nvrtc::open(self.options.nvrtc.as_deref()).map_err(|e| match &self.options.kernels {
            Some(folder) => refuse(format!("{} has no {name} and it cannot be compiled: {e}", folder.display())),
            None => e,
        })?;
        let compiled = nvrtc.compile(&module.name(), &module.source(), self.architecture)?;
        if let Some(folder) = &self.options.cache {
            std::fs::create_dir_all(folder).map_err(|e| RuntimeError::io("create", folder, e))?;
            write_atomic(&folder.join(&name), &compiled.cubin)?;
        }
        Ok(compiled.cubin)
    }

    /// The function of a kernel, loaded when first wanted. The context is current.
    pub(super) fn function(&mut self, module: CudaModule, kernel: &'static CudaKernel) -> Result<sys::CUfunction> {
        if let Some(function) = self.functions.get(&(module, kernel.entry_point)) {
            return Ok(*function);
        }
        let loaded = match self.modules.get(&module) {
            Some(loaded) => *loaded,
            None => {
                let code = self.code(module)?;
                // SAFETY: `code` is a whole cubin, made by NVRTC; the driver checks its header and refuses what it does not know.
                let loaded = unsafe { result::module::load_data(code.as_ptr().cast()) }
                    .map_err(|e| device_error(&format!("load the kernels of {}", module.name()), e))?;
                self.modules.insert(module, loaded);
                loaded
            }
        };
        let name = CString::new(kernel.entry_point).expect("names of kernels have no zero byte");
        // SAFETY: the module is loaded and stays so until `unload`.
        let function = unsafe { result::module::get_function(loaded, name) }
            .map_err(|e| device_error(&format!("find the kernel {}", kernel.entry_point), e))?;
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: `function` is a function of a loaded module; more than 48 KiB must be asked for.
        unsafe { result::function::set_function_attribute(function, attribute, self.max_shared_bytes as i32) }
            .map_err(|e| device_error("allow more shared memory", e))?;
        self.functions.insert((module, kernel.entry_point), function);
        Ok(function)
    }

    /// Unloads everything; the context is current and nothing runs.
    pub(super) fn unload(&mut self) {
        self.functions.clear();
        for (_, module) in self.modules.drain() {
            // SAFETY: loaded by `function`, unloaded once; nothing uses its functions any more. A failure leaves it to the context's end.
            let _ = unsafe { result::module::unload(module) };
        }
    }
}
