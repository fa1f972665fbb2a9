//! Seconds of one MoE layer on a cluster: what all policies are judged by.
//!
//! A device computes its experts one after another, each as long as its weights take to read or its (padded) rows to multiply; devices
//! wait for the slowest; tokens travel there and back (all-to-all, the busiest device and the busiest node); weights that are sent
//! wait on the busiest sender and receiver. The roofline's shares of peak are those of `tierwise_cost`'s fits to vLLM's kernels.

/// A device of a cluster and its links. Rates are effective: shares of peak are in them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Multiply-adds count two. Operations per second in a grouped GEMM.
    pub flops_per_s: f64,
    /// Bytes per second from its memory.
    pub memory_bytes_per_s: f64,
    /// Bytes per second to and from other devices of its node, each way.
    pub link_bytes_per_s: f64,
    /// Bytes per second to other nodes, for a whole node, each way; infinite in one node.
    pub node_bytes_per_s: f64,
    /// Seconds before a transfer starts.
    pub latency_s: f64,
    /// Seconds before a layer's kernels start.
    pub launch_s: f64,
    /// Rows of a GEMM tile: fewer cost as much.
    pub row_tile: u64,
}

impl Rates {
    /// H100 SXM, BF16, NVLink 4 within and 8 x 400 Gbit/s between nodes: datasheet; 0.85 of the memory's and 0.53 of the arithmetic peak,
    /// fitted to vLLM's kernels; 0.8 of the links.
    pub const fn h100() -> Self {
        Self {
            flops_per_s: 989e12 * 0.53,
            memory_bytes_per_s: 3350e9 * 0.85,
            link_bytes_per_s: 450e9 * 0.8,
            node_bytes_per_s: 400e9 * 0.8,
            latency_s: 10e-6,
            launch_s: 27e-6,
            row_tile: 64,
        }
    }

    /// H200 SXM, as above.
    pub const fn h200() -> Self {
        Self { flops_per_s: 989e12 * 0.63, memory_bytes_per_s: 4800e9 * 0.87, launch_s: 31e-6, ..Self::h100() }
    }

    /// B200 SXM, as above; NVLink 5.
    pub const fn b200() -> Self {
        Self {
            flops_per_s: 2250e12 * 0.35,
            memory_bytes_per_s: 7700e9 * 0.83,
            link_bytes_per_s: 900e9 * 0.8,
            launch_s: 14e-6,
            ..Self::h100()
        }
    }

    /// RTX PRO 6000 over PCIe 5.0 x16.
    pub const fn rtx_pro_6000() -> Self {
        Self {
            flops_per_s: 467e12 * 0.45,
            memory_bytes_per_s: 1792e9 * 0.75,
            link_bytes_per_s: 50e9,
            node_bytes_per_s: 50e9,
            latency_s: 15e-6,
            launch_s: 10e-6,
            row_tile: 64,
        }
    }

    /// By name.
    pub const NAMES: [(&'static str, Self); 4] =
        [("h100", Self::h100()), ("h200", Self::h200()), ("b200", Self::b200()), ("rtx-pro-6000", Self::rtx_pro_6000())];
}

/// One MoE layer on such devices.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerCost {
    /// Bytes of one expert.
    pub expert_bytes: f64,
    /// Operations of one token in one expert.
    pub flops_per_token: f64,
    /// Bytes of one token on a link, one way.
    pub token_bytes: f64,
    /// The devices.
    pub rates: Rates,
    /// How much longer a row takes in a layer whose experts are computed away from home (gather, scatter, plan): 1 or more.
    pub reroute_factor: f64,
}

/// A layer's seconds and where they go.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LayerSeconds {
    /// The slowest device.
    pub compute_s: f64,
    /// Tokens, there and back.
    pub all_to_all_s: f64,
    /// Weights.
    pub transfer_s: f64,
}

impl LayerSeconds {
    /// All of it.
    pub fn total(self) -> f64 {
        self.compute_s + self.all_to_all_s + self.transfer_s
    }
}

impl LayerCost {
    /// A gated expert: three matrices of `hidden` x `inner`; tokens travel in 16 bits.
    pub fn new(hidden: u32, inner: u32, bytes_per_weight: f64, rates: &Rates) -> Self {
        let weights = 3.0 * f64::from(hidden) * f64::from(inner);
        Self {
            expert_bytes: weights * bytes_per_weight,
            flops_per_token: 2.0 * weights,
            token_bytes: 2.0 * f64::from(hidden),
            rates: *rates,
            reroute_factor: 1.0,
        }
    }

    /// One expert with so many tokens.
    pub fn expert_s(&self, tokens: u64) -> f64 {
        if tokens == 0 {
            return 0.0;
        }
        let tile = self.rates.row_tile.max(1);
        // Asked for every place of every expert: a division less is felt.
        let rows =
            if tile.is_power_of_two() { (tokens + (tile - 1)) & !(tile - 1) } else { tokens.next_multiple_of(tile) } as f64;
        (self.expert_bytes / self.rates.memory_bytes_per_s).max(rows * self.flops_per_token / self.rates.flops_per_s)
    }

    /// Seconds that one more token takes on a device that is busy multiplying.
    pub fn token_s(&self) -> f64 {
        self.flops_per_token / self.rates.flops_per_s
    }

    /// Tokens there and back, when each device holds an equal share of all tokens at first. `received`: tokens by device.
    pub fn all_to_all_s(&self, received: &[u64]) -> f64 {
        let devices = received.len() as f64;
        if devices <= 1.0 {
            return 0.0;
        }
        let most = received.iter().copied().max().unwrap_or(0) as f64;
        let total: f64 = received.iter().map(|r| *r as f64).sum();
        // What a device receives comes from the others; what it sends went out evenly.
        let busiest = (most * (1.0 - 1.0 / devices)).max(total / devices * (1.0 - 1.0 / devices));
        2.0 * (self.rates.latency_s + busiest * self.token_bytes / self.rates.link_bytes_per_s)
    }

    /// So many experts sent by the busiest sender or to the busiest receiver.
    pub fn transfer_s(&self, experts: u64) -> f64 {
        if experts == 0 { 0.0 } else { self.rates.latency_s + experts as f64 * self.expert_bytes / self.rates.link_bytes_per_s }
    }

    /// Tokens from which a copy of an expert to another device pays: as much computing as sending.
    pub fn break_even_tokens(&self) -> f64 {
        self.expert_bytes / self.rates.link_bytes_per_s / self.token_s()
    }
}
