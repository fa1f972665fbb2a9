//! Launches that repeat become graphs: what a decoded token asks for is the same from token to token but for a few numbers.
//!
//! A submission whose kernels and addresses were seen before is made into a graph of kernels one after the other. From then on the
//! nodes whose numbers or grids differ (positions, ranges of attention) are changed in place, and one call starts all. What a device
//! refuses is said once and launched plainly from then on. No device is touched here, so that the tests run the same code on an
//! emulator.

use super::launch::{Argument, Launch};
use crate::error::Result;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Submissions of fewer launches are not worth a graph.
const LEAST_LAUNCHES: usize = 8;
/// Submissions that are remembered: a step of a large model has some tens.
const MOST: usize = 1024;

/// Who makes and runs graphs.
pub trait GraphTarget {
    /// A graph on the device.
    type Graph;

    /// Makes a graph of launches, each of which waits for the one before.
    ///
    /// # Errors
    /// When the device refuses.
    fn build(&mut self, launches: &[Launch]) -> Result<Self::Graph>;

    /// Gives a node other numbers and another grid.
    ///
    /// # Errors
    /// When the device refuses.
    fn change(&mut self, graph: &mut Self::Graph, node: usize, launch: &Launch) -> Result<()>;

    /// Starts a graph.
    ///
    /// # Errors
    /// When the device refuses.
    fn run(&mut self, graph: &Self::Graph) -> Result<()>;

    /// Starts one launch.
    ///
    /// # Errors
    /// When the device refuses.
    fn start(&mut self, launch: &Launch) -> Result<()>;
}

/// What was submitted, and its graph once it came again.
struct Known<G> {
    launches: Vec<Launch>,
    graph: Option<G>,
}

/// Counts since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GraphCounts {
    /// Graphs made.
    pub built: u64,
    /// Submissions that were one graph.
    pub run: u64,
    /// Nodes that were changed for them.
    pub changed: u64,
    /// Submissions that were launched one by one.
    pub plain: u64,
}

/// All graphs of a back-end.
pub struct Graphs<G> {
    known: HashMap<u64, Known<G>>,
    refused: Option<String>,
    counts: GraphCounts,
}

impl<G> Default for Graphs<G> {
    fn default() -> Self {
        Self { known: HashMap::new(), refused: None, counts: GraphCounts::default() }
    }
}

/// Kernels and addresses are the same; numbers and grids may differ.
fn alike(a: &[Launch], b: &[Launch]) -> bool {
    let addresses = |l: &Launch| {
        let pointers: Vec<Argument> = l.arguments.iter().copied().filter(|a| matches!(a, Argument::Pointer(_))).collect();
        pointers
    };
    let same = |(a, b): (&Launch, &Launch)| {
        a.module == b.module && a.kernel.entry_point == b.kernel.entry_point && addresses(a) == addresses(b)
    };
    a.len() == b.len() && a.iter().zip(b).all(same)
}

fn key(launches: &[Launch]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for l in launches {
        (l.module, l.kernel.entry_point).hash(&mut hasher);
        for a in &l.arguments {
            if let Argument::Pointer(address) = a {
                address.hash(&mut hasher);
            }
        }
    }
    hasher.finish()
}

impl<G> Graphs<G> {
    /// Counts since the start.
    pub const fn counts(&self) -> GraphCounts {
        self.counts
    }

    /// Why nothing becomes a graph any more.
    pub fn refused(&self) -> Option<&str> {
        self.refused.as_deref()
    }

    /// Forgets all graphs.
    pub fn clear(&mut self) {
        self.known.clear();
    }

    /// Starts launches in order.
    ///
    /// # Errors
    /// When the device refuses a launch. A refused graph is no error: [`Self::refused`].
    pub fn submit(&mut self, launches: &[Launch], target: &mut dyn GraphTarget<Graph = G>) -> Result<()> {
        if launches.len() >= LEAST_LAUNCHES && self.refused.is_none() {
            match self.as_graph(launches, target) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(reason) => {
                    self.refused = Some(reason.to_string());
                    self.known.clear();
                }
            }
        }
        self.counts.plain += 1;
        launches.iter().try_for_each(|l| target.start(l))
    }

    /// Whether the launches were started as a graph.
    fn as_graph(&mut self, launches: &[Launch], target: &mut dyn GraphTarget<Graph = G>) -> Result<bool> {
        let key = key(launches);
        if self.known.len() >= MOST && !self.known.contains_key(&key) {
            // Those that never came again make room.
            self.known.retain(|_, k| k.graph.is_some());
        }
        let Some(known) = self.known.get_mut(&key) else {
            if self.known.len() < MOST {
                self.known.insert(key, Known { launches: launches.to_vec(), graph: None });
            }
            return Ok(false);
        };
        if !alike(&known.launches, launches) {
            return Ok(false);
        }
        match &mut known.graph {
            None => {
                known.graph = Some(target.build(launches)?);
                known.launches.clear();
                known.launches.extend_from_slice(launches);
                self.counts.built += 1;
            }
            Some(graph) => {
                for (node, (old, new)) in known.launches.iter_mut().zip(launches).enumerate() {
                    if old != new {
                        target.change(graph, node, new)?;
                        old.clone_from(new);
                        self.counts.changed += 1;
                    }
                }
            }
        }
        let Some(graph) = &known.graph else { return Ok(false) };
        target.run(graph)?;
        self.counts.run += 1;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::RuntimeError;
    use tierwise_shaders::cuda::CudaModule;

    /// Does nothing but remember what ran.
    #[derive(Default)]
    struct Recorder {
        ran: Vec<Launch>,
        refuses: Option<&'static str>,
    }

    impl Recorder {
        fn check(&self, action: &'static str) -> Result<()> {
            match self.refuses.filter(|r| *r == action) {
                Some(r) => Err(RuntimeError::Device { device: "recorder", reason: r.into() }),
                None => Ok(()),
            }
        }
    }

    impl GraphTarget for Recorder {
        type Graph = Vec<Launch>;

        fn build(&mut self, launches: &[Launch]) -> Result<Vec<Launch>> {
            self.check("build")?;
            Ok(launches.to_vec())
        }

        fn change(&mut self, graph: &mut Vec<Launch>, node: usize, launch: &Launch) -> Result<()> {
            self.check("change")?;
            graph[node] = launch.clone();
            Ok(())
        }

        fn run(&mut self, graph: &Vec<Launch>) -> Result<()> {
            self.check("run")?;
            self.ran.extend_from_slice(graph);
            Ok(())
        }

        fn start(&mut self, launch: &Launch) -> Result<()> {
            self.ran.push(launch.clone());
            Ok(())
        }
    }

    /// `count` launches at `address`, of which every third has a number that changes from step to step.
    fn launches(count: usize, address: u64, step: u32) -> Vec<Launch> {
        let kernel = CudaModule::Elementwise.kernel("axpy").expect("registered");
        let launch = |i: usize| Launch {
            module: CudaModule::Elementwise,
            kernel,
            grid: [1, 1, 1],
            shared_bytes: 0,
            arguments: vec![
                Argument::Pointer(address + i as u64),
                Argument::Pointer(64),
                Argument::F32(1.0),
                Argument::U32(if i.is_multiple_of(3) { step } else { 7 }),
            ],
        };
        (0..count).map(launch).collect()
    }

    /// Whatever becomes a graph, and whatever is refused, what runs is what was submitted, in order.
    #[test]
    fn what_runs_is_what_was_submitted() {
        for refuses in [None, Some("build"), Some("change"), Some("run")] {
            let (mut graphs, mut device) = (Graphs::default(), Recorder { refuses, ..Recorder::default() });
            let mut expected = Vec::new();
            for step in 0..6 {
                for list in [launches(12, 1000, step), launches(3, 5000, step), launches(20, 9000, step)] {
                    graphs.submit(&list, &mut device).expect("launched");
                    expected.extend(list);
                }
            }
            assert_eq!(device.ran, expected, "{refuses:?}");
            let counts = graphs.counts();
            match refuses {
                None => {
                    // Remembered, made, and then changed four times: four nodes of twelve and seven of twenty.
                    let found = GraphCounts { built: 2, run: 10, changed: 4 * (4 + 7), plain: 6 + 2 };
                    assert_eq!(counts, found);
                }
                Some(reason) => assert!(graphs.refused().is_some_and(|r| r.contains(reason))),
            }
        }
    }

    /// Other addresses are another graph.
    #[test]
    fn other_addresses_are_no_repetition() {
        let (mut graphs, mut device) = (Graphs::default(), Recorder::default());
        for address in 0..10 {
            graphs.submit(&launches(12, 1000 * address, 0), &mut device).expect("launched");
        }
        assert_eq!(graphs.counts(), GraphCounts { plain: 10, ..GraphCounts::default() });
    }
}
