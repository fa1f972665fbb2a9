//! Compiles every CUDA kernel ahead of time, without a GPU: `cuda_kernels FOLDER ARCHITECTURE... [--nvrtc FOLDER]`, e.g. `cuda_kernels kernels 90`.
//!
//! A program given that folder needs nothing but the driver. Prints what each kernel takes, as Markdown.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tierwise_runtime::backend::cuda::kernels::compile_all;
use tierwise_runtime::backend::cuda::nvrtc::Nvrtc;
use tierwise_runtime::error::Result;
use tierwise_shaders::cuda::{CudaModule, weights_shared_bytes};

fn main() -> ExitCode {
    let (mut folders, mut nvrtc, mut architectures) = (Vec::new(), None, Vec::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.parse() {
            _ if argument == "--nvrtc" => nvrtc = arguments.next().map(PathBuf::from),
            Ok(number) => architectures.push(number),
            Err(_) => folders.push(PathBuf::from(argument)),
        }
    }
    let [folder] = &folders[..] else {
        eprintln!("usage: cuda_kernels FOLDER ARCHITECTURE... [--nvrtc FOLDER]");
        return ExitCode::from(2);
    };
    match compile(folder, nvrtc.as_deref(), &architectures) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn compile(folder: &Path, nvrtc: Option<&Path>, architectures: &[u32]) -> Result<()> {
    let nvrtc = Nvrtc::open(nvrtc)?;
    println!("| architecture | module | kernel | registers | spilled bytes | shared bytes |\n|---|---|---|---|---|---|");
    for &architecture in architectures {
        for (module, compiled) in compile_all(&nvrtc, architecture, folder)? {
            for u in &compiled.usage {
                let shared = match module {
                    CudaModule::Weights(format) => weights_shared_bytes(format, &u.entry_point).unwrap_or(0).to_string(),
                    _ => "by shape".into(),
                };
                let (name, spilled) = (module.name(), u.spill_bytes);
                println!("| sm_{architecture} | {name} | {} | {} | {spilled} | {shared} |", u.entry_point, u.registers);
            }
        }
    }
    Ok(())
}
