//! Graphs of kernels on the device, through the driver's interface: nodes are made one by one, so that each can be changed later.

use super::launch::Launch;
use super::{device_error, refuse};
use crate::error::Result;
use cudarc::driver::{CudaContext, sys};
use std::ffi::c_void;
use std::sync::Arc;

/// CUDA 12.0.
const LEAST_DRIVER: i32 = 12_000;

/// A graph that can be launched.
pub struct CudaGraph {
    context: Arc<CudaContext>,
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
    nodes: Vec<sys::CUgraphNode>,
}

/// Calls `call` with a launch's parameters, which live as long as the call: the driver copies what they point to.
fn with_params(
    l: &Launch,
    func: sys::CUfunction,
    call: impl FnOnce(*const sys::CUDA_KERNEL_NODE_PARAMS) -> sys::CUresult,
) -> sys::CUresult {
    let mut values: Vec<u64> = l.arguments.iter().map(|a| a.bits()).collect();
    let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|v| std::ptr::from_mut(v).cast()).collect();
    let params = sys::CUDA_KERNEL_NODE_PARAMS {
        func,
        gridDimX: l.grid[0],
        gridDimY: l.grid[1],
        gridDimZ: l.grid[2],
        blockDimX: l.kernel.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: l.shared_bytes,
        kernelParams: pointers.as_mut_ptr(),
        extra: std::ptr::null_mut(),
        kern: std::ptr::null_mut(),
        ctx: std::ptr::null_mut(),
    };
    call(&raw const params)
}

impl CudaGraph {
    /// A graph of launches with their functions, each of which waits for the one before. The context is current.
    pub fn new(context: &Arc<CudaContext>, launches: &[(&Launch, sys::CUfunction)]) -> Result<Self> {
        let failed = |what: &str, code: sys::CUresult| code.result().map_err(|e| device_error(what, e));
        let mut version = 0;
        // SAFETY: writes one integer.
        failed("ask for the driver's version", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
        if version < LEAST_DRIVER {
            // Older ones lack functions that are looked up by name below.
            return Err(refuse(format!("the driver is of CUDA {}.{}, graphs need 12.0", version / 1000, version % 1000 / 10)));
        }
        let mut made =
            Self { context: Arc::clone(context), graph: std::ptr::null_mut(), exec: std::ptr::null_mut(), nodes: Vec::new() };
        // SAFETY: writes one handle, which `drop` destroys.
        failed("make a graph", unsafe { sys::cuGraphCreate(&raw mut made.graph, 0) })?;
        for (launch, function) in launches {
            let mut node = std::ptr::null_mut();
            let before = made.nodes.last().map_or(&[][..], std::slice::from_ref);
            // SAFETY: the graph is live, `before` holds a node of it, the parameters are as for a plain launch (`CudaBackend::start`).
            let code = with_params(launch, *function, |params| unsafe {
                sys::cuGraphAddKernelNode_v2(&raw mut node, made.graph, before.as_ptr(), before.len(), params)
            });
            failed("add a kernel to a graph", code)?;
            made.nodes.push(node);
        }
        // SAFETY: writes one handle, which `drop` destroys; the graph is complete.
        failed("prepare a graph", unsafe { sys::cuGraphInstantiateWithFlags(&raw mut made.exec, made.graph, 0) })?;
        Ok(made)
    }

    /// Gives a node the numbers and the grid of `launch`, which is of the same kernel. Launches under way keep theirs.
    pub fn change(&mut self, node: usize, launch: &Launch, function: sys::CUfunction) -> Result<()> {
        // SAFETY: the node is one of the graph that was instantiated, and its kernel stays the same.
        let code = with_params(launch, function, |params| unsafe {
            sys::cuGraphExecKernelNodeSetParams_v2(self.exec, self.nodes[node], params)
        });
        code.result().map_err(|e| device_error("change a kernel of a graph", e))
    }

    /// Starts it behind what the stream holds.
    pub fn launch(&self, stream: sys::CUstream) -> Result<()> {
        // SAFETY: the graph is instantiated; what its kernels read and write are parts of live blocks, checked when they were planned.
        unsafe { sys::cuGraphLaunch(self.exec, stream) }.result().map_err(|e| device_error("start a graph", e))
    }
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_err() {
            return;
        }
        // SAFETY: made by `new`, destroyed once; the driver keeps what a launch under way needs. A failure means a lost device.
        unsafe {
            if !self.exec.is_null() {
                let _ = sys::cuGraphExecDestroy(self.exec);
            }
            if !self.graph.is_null() {
                let _ = sys::cuGraphDestroy(self.graph);
            }
        }
    }
}
