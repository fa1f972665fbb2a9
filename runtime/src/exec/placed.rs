//! Experts on the memory nodes that a plan names: copied once at load into a region per memory, bound to the memory's nodes.
//!
//! A plan whose memories name no nodes keeps its experts in the memory map, wherever the system put the pages. Where nodes are named (CXL
//! memory beside DRAM), that is not enough: page cache lies where a reader ran. So experts are read past the page cache into regions, in
//! the layout of slots: an expert is then an image that loader threads can copy into a slot as it is. Promotion from far memory to a slot
//! in near memory is such a copy; demotion drops the slot, because the home image stays.

use super::loader::{ExpertReader, ExpertTable, FileReader};
use super::model::Model;
use crate::error::{Result, RuntimeError};
use crate::memory::numa::{self, Spread};
use crate::memory::{Need, NodeRegion, PageSize, check_nodes, check_room, words};
use crate::probe::nodes::Nodes;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tierwise_cost::machine::MemoryKind;
use tierwise_cost::units::Bytes;
use tierwise_planner::engine::ExpertKey;
use tierwise_planner::{CheckedPlan, budget};

/// Files are read by so many threads at once: drives need a few to reach their bandwidth.
const READERS: usize = 4;

/// Nodes of the plan's memory of this name; empty when it names none.
pub fn nodes_of<'p>(plan: &'p CheckedPlan, memory: &str) -> &'p [u32] {
    plan.plan().budgets.iter().find(|b| b.memory == memory).map_or(&[], |b| &b.numa_nodes)
}

/// Some experts of the plan are to lie on nodes that it names.
pub fn names_nodes(plan: &CheckedPlan) -> bool {
    placed_experts(plan).next().is_some()
}

/// Experts that a memory with named nodes holds, with that memory.
fn placed_experts(plan: &CheckedPlan) -> impl Iterator<Item = (ExpertKey, &str)> {
    let keys =
        plan.moe_layers().iter().flat_map(move |l| (0..plan.num_experts(*l)).map(move |expert| ExpertKey { layer: *l, expert }));
    keys.filter_map(move |key| {
        let tier = plan.tier(plan.tier_of(key.layer, key.expert));
        let on_host = matches!(tier.kind, MemoryKind::Dram | MemoryKind::Cxl);
        (on_host && !nodes_of(plan, &tier.memory).is_empty()).then_some((key, tier.memory.as_str()))
    })
}

/// Experts of one memory.
#[derive(Debug)]
pub struct PlacedRegion {
    /// The plan's name of the memory.
    pub memory: String,
    /// Their images.
    pub region: NodeRegion,
    /// Their number.
    pub experts: usize,
}

/// All experts that a plan puts on nodes.
#[derive(Debug)]
pub struct Placed {
    regions: Vec<PlacedRegion>,
    table: Arc<ExpertTable>,
    /// `[layer][expert]` to region and offset; empty for layers without placed experts.
    at: Vec<Vec<Option<(usize, usize)>>>,
    pages: PageSize,
    bypassed_page_cache: bool,
    took: Duration,
}

impl Placed {
    /// An expert's image, and where gate, up and down begin in it; `None` if it is not placed.
    pub(super) fn image(&self, layer: u32, expert: u32) -> Option<(&[u8], [usize; 3])> {
        let (region, offset) = (*self.at.get(layer as usize)?.get(expert as usize)?)?;
        let starts = self.table.expert(ExpertKey { layer, expert }).map(|e| e.in_slot());
        Some((&self.regions[region].region.as_slice()[offset..offset + self.table.slot_bytes(layer)], starts))
    }

    /// The regions.
    pub fn regions(&self) -> &[PlacedRegion] {
        &self.regions
    }

    /// The pages that were asked for.
    pub const fn pages(&self) -> PageSize {
        self.pages
    }

    /// Every expert is where this plan wants it.
    pub fn is_for(&self, plan: &CheckedPlan) -> bool {
        let mut wanted = 0;
        let all = placed_experts(plan).all(|(key, memory)| {
            wanted += 1;
            let at = self.at.get(key.layer as usize).and_then(|l| l.get(key.expert as usize).copied().flatten());
            at.is_some_and(|(region, _)| {
                let region = &self.regions[region];
                region.memory == memory && region.region.nodes() == nodes_of(plan, memory)
            })
        });
        all && wanted == self.regions.iter().map(|r| r.experts).sum::<usize>()
    }
}

impl fmt::Display for Placed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let region = |r: &PlacedRegion| {
            let how = match r.region.spread() {
                Spread::Bind => "",
                Spread::Interleave => " in turn",
                Spread::WeightedInterleave => " in turn by the system's weights",
            };
            let bytes = Bytes(r.region.as_slice().len() as u64);
            format!("{} of {} ({bytes}) on {}{how}", r.experts, r.memory, words(r.region.nodes()))
        };
        let regions: Vec<String> = self.regions.iter().map(region).collect();
        let cache = if self.bypassed_page_cache { "bypassed" } else { "used, then dropped" };
        write!(
            f,
            "experts placed in {:.1} s: {}; {}, page cache {cache}",
            self.took.as_secs_f64(),
            regions.join(", "),
            self.pages.name()
        )
    }
}

/// What a plan is going to take of its nodes. `table` holds the placed layers.
fn needs(plan: &CheckedPlan, table: &ExpertTable, pages: PageSize) -> Vec<Need> {
    let mut images: BTreeMap<&str, usize> = BTreeMap::new();
    for (key, memory) in placed_experts(plan) {
        *images.entry(memory).or_default() += table.slot_bytes(key.layer);
    }
    let with_nodes = plan.plan().budgets.iter().filter(|b| !b.numa_nodes.is_empty());
    with_nodes
        .map(|b| {
            let images = pages.rounded(images.get(b.memory.as_str()).copied().unwrap_or(0)) as u64;
            // Only images are in huge pages that were set aside.
            let others: u64 = if pages == PageSize::Hugetlb {
                0
            } else {
                [budget::EXPERT_CACHE, budget::KV, budget::ACTIVATIONS, budget::NON_EXPERT_WEIGHTS]
                    .map(|l| b.line(l).0)
                    .iter()
                    .sum()
            };
            Need { memory: b.memory.clone(), nodes: b.numa_nodes.clone(), bytes: images + others }
        })
        .filter(|n| n.bytes > 0)
        .collect()
}

/// Allocates and fills the regions of `plan`; `None` when it names no nodes.
pub(super) fn place(model: &Model, plan: &CheckedPlan, pages: PageSize) -> Result<Option<Placed>> {
    let mut layers: Vec<u32> = placed_experts(plan).map(|(key, _)| key.layer).collect();
    layers.dedup();
    if layers.is_empty() {
        return Ok(None);
    }
    if let Some(layer) = layers.iter().find(|l| model.experts_are_made(**l)) {
        return Err(RuntimeError::BadRequest {
            what: "plan",
            found: format!("experts of layer {layer} on chosen nodes"),
            expected: "memories without numa_nodes: this checkpoint's experts are decoded at load and are not in the files as they are computed \
                       with; make a GGUF file of it with `tierwise convert`"
                .into(),
        });
    }
    let table = Arc::new(model.expert_table(layers.iter().copied()));
    let (there, needs) = (Nodes::of_this_machine(), needs(plan, &table, pages));
    check_nodes(&needs, &there)?;
    check_room(&needs, &there, pages)?;
    let start = Instant::now();
    settle_home(model, plan)?;
    let mut at: Vec<Vec<Option<(usize, usize)>>> = vec![Vec::new(); model.spec().layers.len()];
    for layer in &layers {
        at[*layer as usize] = vec![None; plan.num_experts(*layer) as usize];
    }
    let mut keys: Vec<(&str, Vec<ExpertKey>)> = Vec::new();
    for (key, memory) in placed_experts(plan) {
        match keys.iter_mut().find(|(m, _)| *m == memory) {
            Some((_, keys)) => keys.push(key),
            None => keys.push((memory, vec![key])),
        }
    }
    let reader = match FileReader::direct(Arc::clone(&table))? {
        Ok(reader) => reader,
        Err(_) => FileReader::new(Arc::clone(&table))?,
    };
    let mut regions = Vec::with_capacity(keys.len());
    for (memory, keys) in keys {
        let bytes = keys.iter().map(|k| table.slot_bytes(k.layer)).sum();
        let mut region = NodeRegion::new(bytes, nodes_of(plan, memory), pages)?;
        let mut offset = 0;
        for key in &keys {
            at[key.layer as usize][key.expert as usize] = Some((regions.len(), offset));
            offset += table.slot_bytes(key.layer);
        }
        fill(&reader, &keys, region.as_mut_slice())?;
        regions.push(PlacedRegion { memory: memory.to_string(), region, experts: keys.len() });
    }
    let bypassed_page_cache = reader.is_direct();
    if !bypassed_page_cache {
        reader.drop_page_cache();
    }
    Ok(Some(Placed { regions, table, at, pages, bypassed_page_cache, took: start.elapsed() }))
}

/// Reads experts one after the other into `images`.
fn fill(reader: &FileReader, keys: &[ExpertKey], mut images: &mut [u8]) -> Result<()> {
    let mut jobs = Vec::with_capacity(keys.len());
    for key in keys {
        let (image, rest) = images.split_at_mut(reader.table().slot_bytes(key.layer));
        jobs.push((*key, image));
        images = rest;
    }
    let jobs = Mutex::new(jobs.into_iter());
    let failed: Mutex<Option<(ExpertKey, String)>> = Mutex::new(None);
    let work = || {
        loop {
            // A thread that panicked has taken its job whole.
            let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((key, image)) = job else { return };
            if let Err(reason) = reader.read(key, image) {
                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert((key, reason));
                return;
            }
        }
    };
    std::thread::scope(|s| (0..READERS).for_each(|_| drop(s.spawn(work))));
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        None => Ok(()),
        Some((key, reason)) => Err(RuntimeError::ExpertsUnavailable { layer: key.layer, reason }),
    }
}

/// What is no expert: memory that this thread and those it starts are going to take comes from the nodes of the main memory, and pages of
/// the map are brought there as far as the system moves them (others' pages stay; `verify` counts them).
fn settle_home(model: &Model, plan: &CheckedPlan) -> Result<()> {
    let home = nodes_of(plan, &plan.plan().main.memory);
    if home.is_empty() {
        return Ok(());
    }
    numa::prefer(home).map_err(|e| RuntimeError::BadRequest {
        what: "memory on a node",
        found: format!("{} preferred, refused ({e})", words(home)),
        expected: "a process that may call set_mempolicy, or a machine file without numa_nodes".into(),
    })?;
    let [node] = home else { return Ok(()) };
    let page = numa::page_bytes();
    for bytes in model.non_expert_bytes() {
        std::hint::black_box(bytes.iter().step_by(page).chain(bytes.last()).fold(0_u8, |sum, b| sum ^ b));
        // Refused to move: the pages are used where they are, and counted there.
        let _ = numa::move_to(bytes, *node);
    }
    Ok(())
}

/// Copies placed experts into slots; reads the others from the files.
pub struct PlacedReader {
    model: Arc<Model>,
    files: FileReader,
}

impl PlacedReader {
    /// A reader of a model that was placed.
    pub const fn new(model: Arc<Model>, files: FileReader) -> Self {
        Self { model, files }
    }
}

impl ExpertReader for PlacedReader {
    fn read(&self, key: ExpertKey, buffer: &mut [u8]) -> Result<(), String> {
        match self.model.placed().and_then(|p| p.image(key.layer, key.expert)) {
            None => self.files.read(key, buffer),
            Some((image, _)) => {
                let slot = buffer.get_mut(..image.len()).ok_or("a slot shorter than its expert: an error in Tierwise")?;
                slot.copy_from_slice(image);
                Ok(())
            }
        }
    }
}
