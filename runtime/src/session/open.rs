//! Opening a session: what the plan wants, allocated; what this program cannot do, refused by name.

use super::resize::BudgetControl;
use super::steps::Steps;
use super::{Session, SessionConfig};
use crate::backend::device::DeviceBackend;
use crate::error::{Result, RuntimeError};
use crate::exec::driver::Driver;
use crate::exec::executor::Executor;
use crate::exec::loader::{
    DeviceCopies, DevicePlace, DiskExperts, ExpertReader, ExpertTable, FileReader, IoOptions, Loader, PageCache,
};
use crate::exec::model::Model;
use crate::exec::placed::{PlacedReader, names_nodes, nodes_of};
use crate::exec::slots::{ExpertSlots, HostSlots, PoolMemory};
use crate::hybrid::executor::{HybridConfig, HybridExecutor};
use crate::hybrid::experts::{DEVICE, slots_on_device};
use crate::memory::PageSize;
use std::sync::Arc;
use tierwise_cost::machine::{MemoryKind, ProcessorKind};
use tierwise_planner::CheckedPlan;
use tierwise_planner::check::Pool;
use tierwise_planner::engine::costs::EngineCosts;
use tierwise_planner::engine::{Engine, ExpertKey};
use tierwise_planner::plan::PrefetchKind;

/// Who reads experts on disk into slots in host memory.
pub(super) enum Source<'a> {
    /// The model's files, as the configuration says.
    Files,
    /// Another reader; none for a plan that reads nothing.
    Reader(Option<&'a Arc<dyn ExpertReader>>),
}

/// Whether a plan's main processor is a GPU: then a session needs a device.
pub fn needs_device(plan: &CheckedPlan) -> bool {
    plan.plan().main.executor_kind == ProcessorKind::Gpu
}

pub(super) fn open(
    model: Arc<Model>,
    plan: &CheckedPlan,
    config: SessionConfig,
    costs: Option<Arc<EngineCosts>>,
    source: &Source<'_>,
    backend: Option<Box<dyn DeviceBackend>>,
) -> Result<Session> {
    check_plan(&model, plan, backend.is_some())?;
    let table = slot_table(&model, plan)?;
    let loader = match source {
        Source::Files if table.paths().is_empty() => Loader::idle(),
        Source::Files if model.placed().is_some() => copying_loader(&model, &table, config.io)?,
        Source::Files => Loader::open(&table, config.io)?,
        Source::Reader(reader) => reader.map_or_else(|| Ok(Loader::idle()), Loader::with_reader)?,
    };
    let settings = plan.plan().engine;
    let asked = if settings.prefetch == PrefetchKind::Lookahead { settings.prefetch_layers } else { 0 };
    let lookahead = config.lookahead.max(asked);
    let context = plan.context() as usize;
    let engine = engine(plan, costs.as_ref())?;
    let (executor, loader, device_pools) = match backend {
        None => {
            let executor = Executor::new(&model, config.threads, context, plan.kv_format(), config.capture_routing, lookahead)?;
            (Steps::Cpu(Box::new(executor)), loader, Vec::new())
        }
        Some(backend) => {
            let hybrid = HybridConfig { threads: config.threads, capture: config.capture_routing, lookahead };
            let (executor, pools) = HybridExecutor::open(&model, plan, hybrid, backend)?;
            let loader = match device_copies(&model, plan, &executor)? {
                Some(copies) => loader.with_device(copies)?,
                None => loader,
            };
            (Steps::Device(Box::new(executor)), loader, pools)
        }
    };
    let slots = slots(&model, plan, table, device_pools, config.pages)?;
    let on_device = executor.device().is_some();
    let mut driver = Driver::new(engine, slots, loader, costs, config.record);
    if on_device {
        driver = driver.with_device(DEVICE);
    }
    driver.begin();
    Ok(Session {
        budget: BudgetControl::new(plan, driver.control()),
        model,
        executor,
        driver,
        chunk_tokens: plan.chunk_tokens().max(1) as usize,
        most_sequences: plan.batch().max(1) as usize,
        logits: Vec::new(),
        step_logits: Vec::new(),
        prefill: Default::default(),
        decode: Default::default(),
    })
}

/// The plan's pools: places on the device where there are some, else buffers in host memory.
fn slots(
    model: &Model,
    plan: &CheckedPlan,
    table: Arc<ExpertTable>,
    mut on_device: Vec<Option<Vec<DevicePlace>>>,
    pages: PageSize,
) -> Result<ExpertSlots> {
    let num_layers = model.spec().layers.len() as u32;
    let layouts = (0..num_layers).map(|l| model.expert_layout(l)).collect();
    // A pool's slots take an expert of any layer whose experts are no larger.
    let buffer_bytes = |slot_bytes: u64| {
        let fits = |l: &u32| plan.expert_bytes(*l).0 <= slot_bytes;
        (0..num_layers).filter(fits).map(|l| table.slot_bytes(l)).max().unwrap_or(0)
    };
    on_device.resize(plan.pools().len(), None);
    // A slot is allocated by itself, and so small that whole huge pages set aside would be wasted on it.
    let pages = if pages == PageSize::Hugetlb { PageSize::Transparent } else { pages };
    let pool = |(index, (pool, places)): (usize, (&Pool, Option<Vec<DevicePlace>>))| -> Result<PoolMemory> {
        let bytes = buffer_bytes(pool.slot_bytes.0);
        let nodes = slot_memory(plan, index).map_or(&[][..], |memory| nodes_of(plan, memory));
        match places {
            Some(places) => Ok(PoolMemory::Device(places)),
            None => HostSlots::new(pool.slots, bytes, nodes, pages).map(PoolMemory::Host),
        }
    };
    let pools = plan.pools().iter().zip(on_device).enumerate().map(pool).collect::<Result<_>>()?;
    Ok(ExpertSlots::new(layouts, table, pools))
}

/// The memory in which the slots of a pool are; that of any layer for slots that all layers share. `None` for a pool without slots.
pub(super) fn slot_memory(plan: &CheckedPlan, pool: usize) -> Option<&str> {
    let shared = pool >= plan.cache_pools().len();
    let mut layers = plan.moe_layers().iter().filter(|l| plan.slots(**l) > 0 && (shared || plan.pool_of(**l) as usize == pool));
    let layer = *layers.next()?;
    (0..plan.num_experts(layer)).find_map(|e| plan.tier(plan.tier_of(layer, e)).through.as_deref())
}

/// A loader for slots of which some are filled from placed experts.
fn copying_loader(model: &Arc<Model>, table: &Arc<ExpertTable>, io: IoOptions) -> Result<Loader> {
    let files = match io.page_cache {
        PageCache::Use => FileReader::new(Arc::clone(table))?,
        PageCache::Auto | PageCache::Bypass => match FileReader::direct(Arc::clone(table))? {
            Ok(reader) => reader,
            Err(_) => FileReader::new(Arc::clone(table))?,
        },
    };
    let direct = files.is_direct();
    let reader: Arc<dyn ExpertReader> = Arc::new(PlacedReader::new(Arc::clone(model), files));
    Loader::from_memory(&reader, direct)
}

/// What fills the slots on the device, if there are some.
fn device_copies(model: &Arc<Model>, plan: &CheckedPlan, executor: &HybridExecutor) -> Result<Option<DeviceCopies>> {
    let layouts = executor.slot_layouts(plan);
    if layouts.is_empty() {
        return Ok(None);
    }
    let tiers = layouts.keys().map(|layer| {
        let kinds = (0..plan.num_experts(*layer)).map(|e| plan.tier(plan.tier_of(*layer, e)).kind == MemoryKind::Disk);
        (*layer, kinds.collect::<Vec<bool>>())
    });
    let on_disk: std::collections::HashMap<u32, Vec<bool>> = tiers.filter(|(_, kinds)| kinds.contains(&true)).collect();
    let disk = if on_disk.is_empty() {
        None
    } else {
        let table = Arc::new(model.expert_table(on_disk.keys().copied()));
        let reader: Arc<dyn ExpertReader> = Arc::new(FileReader::new(Arc::clone(&table))?);
        let is_on_disk = move |k: ExpertKey| on_disk.get(&k.layer).is_some_and(|kinds| kinds[k.expert as usize]);
        Some(DiskExperts { table, reader, is_on_disk: Box::new(is_on_disk) })
    };
    Ok(Some(DeviceCopies { copier: executor.backend().copier(), model: Arc::clone(model), layouts, disk }))
}

/// Where the experts of the layers with slots in host memory are; refuses other sizes than the plan's.
fn slot_table(model: &Model, plan: &CheckedPlan) -> Result<Arc<ExpertTable>> {
    let with_slots: Vec<u32> = (0..model.spec().layers.len() as u32).filter(|l| plan.slots(*l) > 0).collect();
    for layer in &with_slots {
        let on_disk = |e| plan.tier(plan.tier_of(*layer, e)).kind == MemoryKind::Disk;
        if model.experts_are_made(*layer) && (0..plan.num_experts(*layer)).any(on_disk) {
            return Err(RuntimeError::BadRequest {
                what: "plan",
                found: format!("experts of layer {layer} on disk"),
                expected:
                    "all in main memory: this checkpoint's experts are decoded at load and are not in the files as they are \
                           computed with; make a GGUF file of it with `tierwise convert` to run it from disk"
                        .to_string(),
            });
        }
        let bytes = model.expert_layout(*layer).map_or(0, |l| l.bytes());
        if bytes as u64 != plan.expert_bytes(*layer).0 {
            return Err(RuntimeError::BadRequest {
                what: "plan",
                found: format!("{} for an expert of layer {layer}", plan.expert_bytes(*layer)),
                expected: format!("{bytes} bytes, as the model's file has; make the plan again"),
            });
        }
    }
    let on_host = with_slots.into_iter().filter(|l| !(needs_device(plan) && slots_on_device(plan, *l)));
    Ok(Arc::new(model.expert_table(on_host)))
}

/// The plan's engine, with the times that it needs.
fn engine(plan: &CheckedPlan, costs: Option<&Arc<EngineCosts>>) -> Result<Engine> {
    if let Some(costs) = costs {
        costs.check(plan).map_err(|e| RuntimeError::BadRequest {
            what: "times of the engine",
            found: e.to_string(),
            expected: "the times of this plan".into(),
        })?;
        return Ok(Engine::with_costs(plan, Arc::clone(costs)));
    }
    let settings = plan.plan().engine;
    if settings.prefetch != PrefetchKind::Off || settings.fill {
        return Err(RuntimeError::BadRequest {
            what: "plan",
            found: "an engine that prefetches or fills, and no times of this machine".into(),
            expected: "the times by which it decides (EngineCosts)".into(),
        });
    }
    Ok(Engine::new(plan))
}

/// Refuses a plan for another model, or for processors and memories that are not there.
fn check_plan(model: &Model, plan: &CheckedPlan, device: bool) -> Result<()> {
    let bad = |found: String, expected: String| Err(RuntimeError::BadRequest { what: "plan", found, expected });
    let (made_for, is) = (&plan.plan().model.fingerprint, model.spec().fingerprint());
    if *made_for != is {
        return bad(format!("made for {} ({made_for})", plan.plan().model.name), format!("one for this model ({is})"));
    }
    let main = &plan.plan().main;
    if device && !needs_device(plan) {
        return bad(
            format!("everything computed on {} ({})", main.executor, main.reason),
            "a plan whose main processor is the GPU: a larger --vram, or --device cpu".to_string(),
        );
    }
    for executor in plan.required_executors() {
        if executor.kind != ProcessorKind::Cpu && !device {
            return bad(
                format!("experts computed on {}", executor.id),
                "a device (--device wgpu or cuda), or a plan for the CPU alone: plan with --vram 0, or for a machine without GPU"
                    .to_string(),
            );
        }
        if executor.kind != ProcessorKind::Cpu && executor.id != main.executor {
            return bad(
                format!("experts computed on {} and {}", main.executor, executor.id),
                "one GPU: plans over several can be made but not run yet".to_string(),
            );
        }
    }
    let placed = model.placed().is_some_and(|p| p.is_for(plan));
    if names_nodes(plan) && !placed {
        return bad("experts on memory nodes".into(), "a model that was placed for this plan (`Model::place`)".into());
    }
    for (layer, moe) in model.spec().moe_layers() {
        for expert in 0..moe.num_experts {
            let tier = plan.tier(plan.tier_of(layer, expert));
            match tier.kind {
                MemoryKind::Dram => {}
                MemoryKind::Cxl if nodes_of(plan, &tier.memory).is_empty() => {
                    return bad(
                        format!("layer {layer} expert {expert} in {}, of which no NUMA node is known", tier.memory),
                        format!(
                            "`numa_nodes = [...]` at {} in the machine's description (`tierwise doctor` lists nodes)",
                            tier.memory
                        ),
                    );
                }
                MemoryKind::Cxl if tier.through.is_none() || plan.slots(layer) > 0 => {}
                MemoryKind::Vram if device && tier.memory == main.memory => {}
                MemoryKind::Disk if plan.slots(layer) > 0 => {}
                MemoryKind::Disk => {
                    return bad(format!("layer {layer} with experts on disk and no slot"), "at least one slot".to_string());
                }
                MemoryKind::Vram | MemoryKind::Cxl => {
                    return bad(
                        format!("layer {layer} expert {expert} in {}", tier.memory),
                        "experts in host memory, on the main GPU or on disk: other memories can be planned for but not used yet"
                            .to_string(),
                    );
                }
            }
        }
    }
    Ok(())
}
