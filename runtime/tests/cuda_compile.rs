//! Every CUDA kernel compiles to machine code for every architecture without spilling a register, where NVIDIA's run-time compiler is:
//! in the folder `TIERWISE_NVRTC_DIR`, in a Python installation (`pip install nvidia-cuda-nvrtc`), or where the system has it.
//!
//! No GPU is needed. The compiler runs in a child process: a crash of it is a failed test, not the end of all tests.
#![cfg(feature = "cuda")]

use std::path::PathBuf;
use std::process::Command;
use tierwise_runtime::backend::cuda::nvrtc::Nvrtc;
use tierwise_shaders::cuda::{CUDA_ARCHITECTURES, CudaModule};

/// Set in the child process: the compiler's folder, empty for where the system has it.
const CHILD: &str = "TIERWISE_NVRTC_CHILD";

fn find() -> Option<PathBuf> {
    if let Some(folder) = std::env::var_os("TIERWISE_NVRTC_DIR") {
        return Some(folder.into());
    }
    let script = "import sys,glob\nfor p in sys.path:\n  for d in ('cu13/lib', 'cuda_nvrtc/lib'):\n    \
                  if glob.glob(p + '/nvidia/' + d + '/libnvrtc.so*'): print(p + '/nvidia/' + d); raise SystemExit";
    let output = Command::new("python3").args(["-c", script]).output().ok()?;
    let found = String::from_utf8_lossy(&output.stdout).trim().to_string();
    if !found.is_empty() {
        return Some(found.into());
    }
    Nvrtc::open(None).is_ok().then(PathBuf::new)
}

#[test]
fn every_kernel_compiles_for_every_architecture_without_spills() {
    let Some(folder) = find() else {
        println!("skipped: no libnvrtc (pip install nvidia-cuda-nvrtc, or set TIERWISE_NVRTC_DIR)");
        return;
    };
    let program = std::env::current_exe().expect("this test is a program");
    let child = Command::new(program)
        .args(["--exact", "child_compiles", "--ignored", "--nocapture"])
        .env(CHILD, &folder)
        .output()
        .expect("the program starts");
    let said = format!("{}{}", String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success(), "the compiler in {folder:?} failed ({}): {said}", child.status);
    assert!(said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "the child process of every_kernel_compiles_for_every_architecture_without_spills"]
fn child_compiles() {
    let Some(folder) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    let nvrtc = Nvrtc::open(Some(folder).filter(|f| !f.as_os_str().is_empty()).as_deref()).expect("found by the parent");
    for &architecture in CUDA_ARCHITECTURES {
        for module in CudaModule::all() {
            let name = module.name();
            let compiled =
                nvrtc.compile(&name, &module.source(), architecture).unwrap_or_else(|e| panic!("sm_{architecture}: {e}"));
            assert!(!compiled.log.contains("warning"), "sm_{architecture} {name}: {}", compiled.log);
            assert!(compiled.cubin.starts_with(b"\x7fELF"), "sm_{architecture} {name}: no machine code");
            let mut reported: Vec<&str> = compiled.usage.iter().map(|u| u.entry_point.as_str()).collect();
            let mut known: Vec<&str> = module.kernels().iter().map(|k| k.entry_point).collect();
            reported.sort_unstable();
            known.sort_unstable();
            assert_eq!(reported, known, "sm_{architecture} {name}: kernels of the source and of the registry");
            for u in &compiled.usage {
                assert!(u.registers > 0 && u.spill_bytes == 0 && u.stack_bytes == 0, "sm_{architecture} {name}: {u:?}");
            }
        }
    }
}
