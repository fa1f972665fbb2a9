//! EPLB, output-equal to upstream: the replicas and places that SGLang, vLLM and TensorRT-LLM compute by default.
//!
//! Groups of experts are packed on nodes, experts replicated within a node, replicas packed on its devices; where groups do not divide
//! among nodes, the same with one node and one group. All arithmetic is float32, sorts are stable and descending, ties go to the first:
//! so are those of deepseek-ai/EPLB `eplb.py` @ d52c72d, whose outputs are the tests. Sums of groups are in order; upstream's order is
//! torch's, which differs only where sums of float32 round (not for counts below 2^24).

use crate::error::PlanError;

/// What is balanced over what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EplbShape {
    /// Slots of all devices together.
    pub num_replicas: usize,
    /// Groups that the router chooses among before it chooses experts; 1 without.
    pub num_groups: usize,
    /// Nodes.
    pub num_nodes: usize,
    /// Devices of all nodes.
    pub num_devices: usize,
}

/// EPLB's output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EplbMaps {
    /// The expert in each slot, device by device. `[layers][num_replicas]`
    pub physical_to_logical: Vec<Vec<u16>>,
    /// Which replica of its expert each slot is. `[layers][num_replicas]`
    pub replica_rank: Vec<Vec<u16>>,
    /// Replicas per expert. `[layers][experts]`
    pub logical_count: Vec<Vec<u16>>,
}

impl EplbMaps {
    /// The slots of each expert, by replica. `[layers][experts][replicas of the expert]`
    pub fn logical_to_physical(&self) -> Vec<Vec<Vec<u32>>> {
        let layers = self.physical_to_logical.iter().zip(&self.replica_rank).zip(&self.logical_count);
        layers
            .map(|((experts, ranks), counts)| {
                let mut slots: Vec<Vec<u32>> = counts.iter().map(|c| vec![0; usize::from(*c)]).collect();
                for (slot, (expert, rank)) in experts.iter().zip(ranks).enumerate() {
                    slots[usize::from(*expert)][usize::from(*rank)] = slot as u32;
                }
                slots
            })
            .collect()
    }
}

#[allow(clippy::needless_pass_by_value, reason = "numbers and texts alike, as they come")]
fn bad<T>(field: &str, found: impl ToString, expected: String) -> Result<T, PlanError> {
    Err(PlanError::BadBalance { field: field.into(), found: found.to_string(), expected })
}

impl EplbShape {
    /// Refuses what upstream refuses by an assertion.
    fn check(&self, num_experts: usize) -> Result<(), PlanError> {
        let Self { num_replicas, num_groups, num_nodes, num_devices } = *self;
        for (field, n) in [("groups", num_groups), ("nodes", num_nodes), ("devices", num_devices), ("experts", num_experts)] {
            if n == 0 || n > usize::from(u16::MAX) {
                return bad(field, n, "1 to 65535".into());
            }
        }
        if num_replicas < num_experts || num_replicas > usize::from(u16::MAX) {
            return bad("replicas", num_replicas, format!("{num_experts}, the number of experts, to 65535"));
        }
        if !num_replicas.is_multiple_of(num_devices) {
            return bad("replicas", num_replicas, format!("a multiple of {num_devices}, the number of devices"));
        }
        if self.is_hierarchical() {
            if !num_experts.is_multiple_of(num_groups) {
                return bad("groups", num_groups, format!("a divisor of {num_experts}, the number of experts"));
            }
            if !num_devices.is_multiple_of(num_nodes) {
                return bad("devices", num_devices, format!("a multiple of {num_nodes}, the number of nodes"));
            }
        }
        Ok(())
    }

    /// Do groups divide among nodes, so that each is kept within one?
    pub fn is_hierarchical(&self) -> bool {
        self.num_groups.is_multiple_of(self.num_nodes)
    }
}

/// Replicas and their places for each layer. `weight` is the load of each expert. `[layers][experts]`
///
/// # Errors
/// [`PlanError::BadBalance`] where numbers do not divide as they must, or a load is negative or not finite.
pub fn eplb(weight: &[Vec<f64>], shape: EplbShape) -> Result<EplbMaps, PlanError> {
    let num_experts = weight.first().map_or(0, Vec::len);
    shape.check(num_experts)?;
    super::loads::check_rows(weight, num_experts)?;
    let (groups, nodes) = if shape.is_hierarchical() { (shape.num_groups, shape.num_nodes) } else { (1, 1) };
    let mut work = Layer::new(num_experts, shape.num_replicas, groups, nodes, shape.num_devices);
    let mut maps = EplbMaps {
        physical_to_logical: Vec::with_capacity(weight.len()),
        replica_rank: Vec::with_capacity(weight.len()),
        logical_count: Vec::with_capacity(weight.len()),
    };
    for row in weight {
        work.balance(row);
        maps.physical_to_logical.push(work.expert_of_slot.clone());
        maps.replica_rank.push(work.rank_of_slot.clone());
        maps.logical_count.push(work.count.clone());
    }
    Ok(maps)
}

/// One layer, and the room it is computed in.
struct Layer {
    groups: usize,
    nodes: usize,
    devices_per_node: usize,
    /// `[experts]`
    weight: Vec<f32>,
    /// The expert at each place after groups were moved to their nodes. `[experts]`
    expert_at: Vec<u16>,
    /// `[experts / nodes]`
    per_replica: Vec<f32>,
    replicas: Vec<u16>,
    /// The expert of each replica of a node, as a place within the node. `[num_replicas / nodes]`
    place_of_replica: Vec<u16>,
    rank_of_replica: Vec<u16>,
    replica_weight: Vec<f32>,
    packing: Packing,
    expert_of_slot: Vec<u16>,
    rank_of_slot: Vec<u16>,
    count: Vec<u16>,
}

impl Layer {
    fn new(experts: usize, num_replicas: usize, groups: usize, nodes: usize, devices: usize) -> Self {
        Self {
            groups,
            nodes,
            devices_per_node: devices / nodes,
            weight: Vec::new(),
            expert_at: vec![0; experts],
            per_replica: Vec::new(),
            replicas: Vec::new(),
            place_of_replica: Vec::new(),
            rank_of_replica: Vec::new(),
            replica_weight: Vec::new(),
            packing: Packing::default(),
            expert_of_slot: vec![0; num_replicas],
            rank_of_slot: vec![0; num_replicas],
            count: vec![0; experts],
        }
    }

    fn balance(&mut self, row: &[f64]) {
        self.weight.clear();
        self.weight.extend(row.iter().map(|w| *w as f32));
        let experts = row.len();
        let group_size = experts / self.groups;
        let group_weight: Vec<f32> = self.weight.chunks_exact(group_size).map(|g| g.iter().sum()).collect();
        self.packing.pack(&group_weight, self.nodes);
        let groups_per_node = self.groups / self.nodes;
        for group in 0..self.groups {
            let place = self.packing.pack[group] as usize * groups_per_node + self.packing.rank[group] as usize;
            for i in 0..group_size {
                self.expert_at[place * group_size + i] = (group * group_size + i) as u16;
            }
        }
        let slots_per_node = self.expert_of_slot.len() / self.nodes;
        let experts_per_node = experts / self.nodes;
        for node in 0..self.nodes {
            let first = node * experts_per_node;
            self.replicate(first, experts_per_node, slots_per_node);
            self.packing.pack(&self.replica_weight, self.devices_per_node);
            let slots_per_device = slots_per_node / self.devices_per_node;
            for replica in 0..slots_per_node {
                let slot = node * slots_per_node
                    + self.packing.pack[replica] as usize * slots_per_device
                    + self.packing.rank[replica] as usize;
                self.expert_of_slot[slot] = self.expert_at[first + usize::from(self.place_of_replica[replica])];
                self.rank_of_slot[slot] = self.rank_of_replica[replica];
            }
        }
    }

    /// Gives one more replica to the expert with the most load per replica, until there are as many as slots.
    fn replicate(&mut self, first: usize, experts: usize, slots: usize) {
        self.per_replica.clear();
        self.per_replica.extend(self.expert_at[first..first + experts].iter().map(|e| self.weight[usize::from(*e)]));
        self.replicas.clear();
        self.replicas.resize(experts, 1);
        self.place_of_replica.clear();
        self.place_of_replica.extend(0..experts as u16);
        self.rank_of_replica.clear();
        self.rank_of_replica.resize(experts, 0);
        for _ in experts..slots {
            let at = first_maximum(&self.per_replica);
            self.place_of_replica.push(at as u16);
            self.rank_of_replica.push(self.replicas[at]);
            self.replicas[at] += 1;
            self.per_replica[at] = self.weight[usize::from(self.expert_at[first + at])] / f32::from(self.replicas[at]);
        }
        self.replica_weight.clear();
        self.replica_weight.extend(self.place_of_replica.iter().map(|p| self.per_replica[usize::from(*p)]));
        for (place, replicas) in self.replicas.iter().enumerate() {
            self.count[usize::from(self.expert_at[first + place])] = *replicas;
        }
    }
}

fn first_maximum(values: &[f32]) -> usize {
    let mut best = 0;
    for (i, v) in values.iter().enumerate().skip(1) {
        if *v > values[best] {
            best = i;
        }
    }
    best
}

/// As many items in every pack, heaviest first, each into the lightest pack that has room.
#[derive(Default)]
struct Packing {
    /// The pack of each item.
    pack: Vec<u32>,
    /// Its place in it.
    rank: Vec<u32>,
    order: Vec<u64>,
    weight_of: Vec<f32>,
    items_of: Vec<u32>,
}

impl Packing {
    fn pack(&mut self, weight: &[f32], packs: usize) {
        let items = weight.len();
        let per_pack = (items / packs) as u32;
        self.pack.clear();
        self.rank.clear();
        if per_pack == 1 {
            self.pack.extend(0..items as u32);
            self.rank.resize(items, 0);
            return;
        }
        self.pack.resize(items, 0);
        self.rank.resize(items, 0);
        // Floats that are not negative sort like their bits; inverted for descending, the index below makes the sort stable.
        self.order.clear();
        self.order.extend(weight.iter().enumerate().map(|(i, w)| (u64::from(!(w + 0.0).to_bits()) << 32) | i as u64));
        self.order.sort_unstable();
        self.weight_of.clear();
        self.weight_of.resize(packs, 0.0);
        self.items_of.clear();
        self.items_of.resize(packs, 0);
        for key in &self.order {
            let item = (key & u64::from(u32::MAX)) as usize;
            let mut to = usize::MAX;
            let mut lightest = f32::INFINITY;
            for (p, w) in self.weight_of.iter().enumerate() {
                // A full pack's weight is infinite.
                if *w < lightest || (to == usize::MAX && self.items_of[p] < per_pack) {
                    lightest = *w;
                    to = p;
                }
            }
            self.pack[item] = to as u32;
            self.rank[item] = self.items_of[to];
            self.items_of[to] += 1;
            self.weight_of[to] = if self.items_of[to] == per_pack { f32::INFINITY } else { self.weight_of[to] + weight[item] };
        }
    }
}
