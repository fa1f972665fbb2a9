//! Threads beside memory nodes: which thread is kept on which node's processors, and whose work it takes first.
//!
//! Where a plan puts experts on several nodes that have processors (sockets), reading them from the other socket goes over the link between
//! the two, at half of the rate or less. So each thread is kept on one node's processors and computes with the experts that lie there; when
//! those are done it helps the others, because an idle thread is worse than a slow one. Who computes what changes no bit. With one such node,
//! or none known, threads go where the system puts them and take work as it comes.

use super::placed::PlacedRegion;
use crate::memory::numa;
use crate::probe::nodes::Nodes;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Where threads are, and what lies beside them. Nodes are numbered from 0 among those with threads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beside {
    /// Node of each thread. `[threads]`
    node_of_thread: Vec<usize>,
    /// The system's numbers of each node's processors. `[nodes]`
    cpus: Vec<Vec<u32>>,
    /// Addresses, and the node on which they are.
    ranges: Vec<(Range<usize>, usize)>,
}

impl Beside {
    /// For `count` threads and these regions on this machine; `None` unless experts lie on several nodes with processors.
    pub fn new(count: usize, regions: &[PlacedRegion]) -> Option<Self> {
        let regions = regions.iter().map(|r| {
            let Range { start, end } = r.region.as_slice().as_ptr_range();
            (start as usize..end as usize, r.region.nodes())
        });
        // Where the system does not say, none are forbidden.
        let allowed = numa::allowed_cpus().ok();
        Self::with(count, &Nodes::of_this_machine(), allowed.as_deref(), regions)
    }

    /// [`Self::new`] on a machine with these nodes, of whose processors only some may be used.
    fn with<'r>(
        count: usize,
        there: &Nodes,
        allowed: Option<&[u32]>,
        regions: impl Iterator<Item = (Range<usize>, &'r [u32])>,
    ) -> Option<Self> {
        let usable = |cpu: &u32| allowed.is_none_or(|all| all.contains(cpu));
        let mut nodes: Vec<(u32, Vec<u32>)> =
            there.usable().map(|n| (n.number, n.cpus.iter().copied().filter(usable).collect())).collect();
        // Striped regions are on no node.
        let regions: Vec<(Range<usize>, u32)> =
            regions.filter_map(|(range, on)| if let [node] = on { Some((range, *node)) } else { None }).collect();
        nodes.retain(|(node, cpus)| !cpus.is_empty() && regions.iter().any(|(_, on)| on == node));
        if nodes.len() < 2 || count < nodes.len() {
            return None;
        }
        let at = |number: u32| nodes.iter().position(|(node, _)| *node == number);
        Some(Self {
            node_of_thread: share_out(count, &nodes.iter().map(|(_, cpus)| cpus.len()).collect::<Vec<_>>()),
            ranges: regions.into_iter().filter_map(|(range, on)| at(on).map(|node| (range, node))).collect(),
            cpus: nodes.into_iter().map(|(_, cpus)| cpus).collect(),
        })
    }

    /// Processors for a thread.
    pub fn cpus_of(&self, thread: usize) -> &[u32] {
        &self.cpus[self.node_of_thread[thread]]
    }

    /// The node on which an address is; `None`: anywhere.
    fn node_at(&self, address: usize) -> Option<usize> {
        self.ranges.iter().find(|(range, _)| range.contains(&address)).map(|(_, node)| *node)
    }

    /// Work to be taken by threads, each its own node's first. `address`: what a piece of work reads most.
    pub fn queues<P>(&self, pieces: Vec<P>, address: impl Fn(&P) -> usize) -> Queues<'_, P> {
        let mut of_node: Vec<Vec<P>> = (0..=self.cpus.len()).map(|_| Vec::new()).collect();
        for piece in pieces {
            let node = self.node_at(address(&piece)).unwrap_or(self.cpus.len());
            of_node[node].push(piece);
        }
        Queues { beside: self, of_node: of_node.into_iter().map(|p| Mutex::new(p.into_iter())).collect() }
    }
}

/// Work by node, and behind the last node's what lies anywhere.
pub struct Queues<'b, P> {
    beside: &'b Beside,
    of_node: Vec<Mutex<std::vec::IntoIter<P>>>,
}

impl<P> Queues<'_, P> {
    /// The next piece for `thread`: of its own node, then of what lies anywhere, then of the other nodes.
    pub fn next(&self, thread: usize) -> Option<P> {
        let nodes = self.beside.cpus.len();
        let own = self.beside.node_of_thread[thread];
        let others = (1..nodes).map(|further| (own + further) % nodes);
        // A piece is taken whole: a thread that panicked has its own.
        let take = |at: usize| self.of_node[at].lock().unwrap_or_else(PoisonError::into_inner).next();
        [own, nodes].into_iter().chain(others).find_map(take)
    }
}

/// The node of each of `count` threads: by turns so that every node gets at least one and the rest go by its number of processors.
fn share_out(count: usize, cpus: &[usize]) -> Vec<usize> {
    let mut threads = vec![1; cpus.len()];
    for _ in cpus.len()..count {
        // The node with the fewest threads per processor; of equals the first.
        let next = (0..cpus.len()).min_by(|a, b| (threads[*a] * cpus[*b]).cmp(&(threads[*b] * cpus[*a])));
        threads[next.unwrap_or(0)] += 1;
    }
    threads.into_iter().enumerate().flat_map(|(node, n)| std::iter::repeat_n(node, n)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::matmul::{Product, prepare, run_products};
    use crate::exec::model::Matrix;
    use crate::exec::threads::Threads;
    use crate::kernels::ActivationBuf;
    use crate::probe::nodes::{Node, NodeKind};
    use tierwise_cost::quant::QuantFormat;
    use tierwise_cost::units::Bytes;

    fn node(number: u32, cpus: Range<u32>) -> Node {
        let kind = if cpus.is_empty() { NodeKind::Cxl } else { NodeKind::Local };
        let total = Bytes::gib(64);
        Node { number, kind, cpus: cpus.collect(), total, free: total, allowed: true, ..Node::default() }
    }

    fn nodes(nodes: Vec<Node>) -> Nodes {
        Nodes { nodes, ..Nodes::default() }
    }

    fn regions<'r>(on: &'r [&'r [u32]]) -> impl Iterator<Item = (Range<usize>, &'r [u32])> {
        on.iter().enumerate().map(|(i, nodes)| (1000 * i..1000 * (i + 1), *nodes))
    }

    #[test]
    fn threads_are_shared_out_by_processors() {
        assert_eq!(share_out(4, &[8, 8]), [0, 0, 1, 1]);
        assert_eq!(share_out(5, &[8, 8]), [0, 0, 0, 1, 1]);
        assert_eq!(share_out(6, &[16, 8]), [0, 0, 0, 0, 1, 1]);
        assert_eq!(share_out(3, &[64, 1, 1]), [0, 1, 2]);
        for count in 2..40 {
            for cpus in [vec![3, 9], vec![1, 1, 5], vec![4, 4, 4, 4]] {
                if count < cpus.len() {
                    continue;
                }
                let of_thread = share_out(count, &cpus);
                assert_eq!(of_thread.len(), count);
                let threads = |node: usize| of_thread.iter().filter(|n| **n == node).count();
                for (a, cpus_of_a) in cpus.iter().enumerate() {
                    assert!(threads(a) > 0);
                    // Nobody has a thread that another should have had before it.
                    let fair = |b: usize| threads(a) == 1 || (threads(a) - 1) * cpus[b] <= threads(b) * cpus_of_a;
                    assert!((0..cpus.len()).all(fair), "{count} threads on {cpus:?}: {of_thread:?}");
                }
            }
        }
    }

    #[test]
    fn only_experts_on_several_sockets_bind_threads() {
        let two = nodes(vec![node(0, 0..4), node(1, 4..8), node(5, 0..0)]);
        let with =
            |there: &Nodes, count, allowed: Option<&[u32]>, on: &[&[u32]]| Beside::with(count, there, allowed, regions(on));
        let found = with(&two, 4, None, &[&[0], &[5], &[1], &[0, 1]]).expect("two sockets");
        assert_eq!(found.node_of_thread, [0, 0, 1, 1]);
        assert_eq!(found.cpus, [[0, 1, 2, 3], [4, 5, 6, 7]]);
        // The card's and the striped region's experts are anywhere.
        let at = [500, 1500, 2500, 3500, 9000].map(|a| found.node_at(a));
        assert_eq!(at, [Some(0), None, Some(1), None, None]);
        // One socket with experts, one socket in all, no experts, fewer threads than sockets.
        assert_eq!(with(&two, 4, None, &[&[0], &[5]]), None);
        assert_eq!(with(&nodes(vec![node(0, 0..4), node(5, 0..0)]), 4, None, &[&[0], &[5]]), None);
        assert_eq!(with(&two, 4, None, &[]), None);
        assert_eq!(with(&nodes(Vec::new()), 4, None, &[&[0], &[1]]), None);
        assert_eq!(with(&two, 1, None, &[&[0], &[1]]), None);
        // A container that leaves processors of one socket, or some of both.
        assert_eq!(with(&two, 4, Some(&[0, 1]), &[&[0], &[1]]), None);
        let some = with(&two, 4, Some(&[0, 4, 5, 6]), &[&[0], &[1]]).expect("two sockets");
        assert_eq!((some.cpus, some.node_of_thread), (vec![vec![0], vec![4, 5, 6]], vec![0, 1, 1, 1]));
        // A node that this process may take no memory from, and numbers with holes.
        let mut barred = two;
        barred.nodes[1].allowed = false;
        assert_eq!(with(&barred, 4, None, &[&[0], &[1]]), None);
        let holes = nodes(vec![node(3, 0..2), node(9, 8..10)]);
        let found = with(&holes, 2, None, &[&[9], &[3]]).expect("two sockets");
        assert_eq!((found.cpus_of(0), found.cpus_of(1), found.node_at(1)), (&[0, 1][..], &[8, 9][..], Some(1)));
    }

    /// Real threads on real processors, which are taken for two sockets where there are two: the same bits as anywhere.
    #[test]
    fn threads_beside_memory_compute_the_same() {
        let cpus = numa::allowed_cpus().expect("asked");
        let (first, last) = (cpus[0], cpus[cpus.len() - 1]);
        let sockets = [Node { cpus: vec![first], ..node(0, 0..1) }, Node { cpus: vec![last], ..node(1, 0..1) }];
        let (rows, cols) = (512, 256);
        let weights: Vec<f32> = (0..2 * rows * cols).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
        let bytes: &[u8] = bytemuck::cast_slice(&weights);
        let [a, b] = [0, 1].map(|i| &bytes[i * bytes.len() / 2..(i + 1) * bytes.len() / 2]);
        let range = |part: &[u8]| part.as_ptr() as usize..part.as_ptr() as usize + part.len();
        let on: [(Range<usize>, &[u32]); 2] = [(range(a), &[0]), (range(b), &[1])];
        let beside = Beside::with(2, &nodes(sockets.to_vec()), Some(&cpus), on.into_iter()).expect("two sockets");
        let x: Vec<f32> = (0..3 * cols).map(|i| ((i * 29) % 83) as f32 / 40.0 - 1.0).collect();
        let compute = |threads: &Threads| {
            let mut input = ActivationBuf::new();
            prepare(threads, QuantFormat::F32, &x, cols, &mut input);
            let mut out = vec![0.0_f32; 2 * 3 * rows];
            let products = [a, b].into_iter().zip(out.chunks_mut(3 * rows)).map(|(bytes, out)| Product {
                weight: Matrix { format: QuantFormat::F32, rows, cols, bytes },
                bias: None,
                input: &input,
                tokens: &[0, 1, 2],
                out,
            });
            let products = products.collect();
            threads.pool().install(|| run_products(threads, products));
            out
        };
        let anywhere = compute(&Threads::new(2).expect("threads"));
        assert!(anywhere.iter().any(|x| *x != 0.0));
        let threads = Threads::beside(2, Some(beside)).expect("kept on processors");
        assert!(compute(&threads) == anywhere);
        let where_they_are = threads.pool().broadcast(|_| numa::allowed_cpus().expect("asked"));
        assert_eq!(where_they_are, [[first], [last]]);
    }

    #[test]
    fn own_work_comes_first_and_all_of_it_is_done_once() {
        let there = nodes(vec![node(0, 0..4), node(1, 4..8), node(2, 8..12)]);
        let beside = Beside::with(6, &there, None, regions(&[&[0], &[1], &[2]])).expect("three sockets");
        let pieces: Vec<usize> = vec![100, 1100, 2100, 200, 1200, 9000, 300];
        let queues = beside.queues(pieces.clone(), |p| *p);
        // Thread 2 is the second node's.
        let mut order = Vec::new();
        while let Some(piece) = queues.next(2) {
            order.push(piece);
        }
        assert_eq!(order, [1100, 1200, 9000, 2100, 100, 200, 300]);
        assert_eq!(queues.next(0), None);
        let queues = beside.queues(pieces.clone(), |p| *p);
        let mut all: Vec<usize> = (0..6).cycle().map_while(|thread| queues.next(thread)).collect();
        all.sort_unstable();
        let mut sorted = pieces;
        sorted.sort_unstable();
        assert_eq!(all, sorted);
    }
}
