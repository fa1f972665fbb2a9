//! Experts over several ranks: whatever the policy, the placement, the number of ranks and the tokens of each, logits are those of one
//! process. Ranks are threads here; `cli/tests/parallel_mpi.rs` has processes.

mod family_models;
mod parallel_common;
mod session_common;

use family_models::write_safetensors_of;
use parallel_common::*;
use session_common::*;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tierwise_cost::quant::QuantFormat;
use tierwise_planner::balance::replay::Policy;
use tierwise_planner::routing::RoutingTrace;
use tierwise_runtime::RuntimeError;
use tierwise_runtime::parallel::channels::ChannelTransport;
use tierwise_runtime::parallel::{ParallelConfig, ParallelSession, ParallelStatistics, Transport, run_threads};
use tierwise_runtime::session::Model;

const LONG: Duration = Duration::from_secs(120);
const OPTIONS: PlanOptions = PlanOptions { context: 128, chunk: CHUNK, kv: QuantFormat::F32, threads: 1, batch: 1 };
const DECODED: usize = 3;

/// Logits of all positions of a rank's sequence, then of tokens decoded after it.
type RankLogits = Vec<Vec<f32>>;

fn forced(trace: Option<&Arc<RoutingTrace>>, rank: usize) -> Option<(Arc<RoutingTrace>, usize)> {
    trace.map(|t| (Arc::clone(t), 200 * rank))
}

/// What one process computes of the sequence of `rank`.
fn alone(model: &Arc<Model>, rank: usize, trace: Option<&Arc<RoutingTrace>>) -> RankLogits {
    let mut session = plain(model, OPTIONS);
    session.force_routing(forced(trace, rank)).expect("of this model");
    let tokens = sequence(model, rank);
    let mut all = Vec::new();
    if tokens.is_empty() {
        return all;
    }
    session.for_each_logits(&tokens, 0, |_, logits| all.push(logits.to_vec())).expect("computed");
    for i in 0..DECODED {
        all.push(session.decode(tokens[i % tokens.len()]).expect("computed").to_vec());
    }
    all
}

/// The same by a rank of several.
fn on_rank(group: &mut ParallelSession, model: &Model, trace: Option<&Arc<RoutingTrace>>) -> Result<RankLogits, RuntimeError> {
    let rank = group.rank();
    group.reset();
    group.session_mut().force_routing(forced(trace, rank))?;
    let tokens = sequence(model, rank);
    let mut all = Vec::new();
    group.for_each_logits(&tokens, |i, logits| {
        assert_eq!(i, all.len());
        all.push(logits.to_vec());
    })?;
    for i in 0..DECODED {
        let token = (!tokens.is_empty()).then(|| tokens[i % tokens.len()]);
        let logits = group.decode(token)?;
        if token.is_some() {
            all.push(logits.to_vec());
        }
    }
    Ok(all)
}

/// Experts of each layer that has some.
fn num_experts(model: &Model) -> Vec<u32> {
    model.spec().moe_layers().map(|(_, m)| m.num_experts).collect()
}

/// Every policy on `ranks` ranks, placed from what the first run counted. Largest difference of a logit, and what ranks did by policy.
fn compare(
    model: &Arc<Model>,
    ranks: usize,
    policies: &[Policy],
    trace: Option<&Arc<RoutingTrace>>,
    expected: &[RankLogits],
) -> (f32, Vec<(Policy, ParallelStatistics)>) {
    let experts = num_experts(model);
    let slots = experts.iter().copied().max().expect("a Mixture of Experts").div_ceil(ranks as u32) + 1;
    let work = |transport: ChannelTransport| -> Result<_, RuntimeError> {
        let rank = transport.rank();
        let first = ParallelConfig::in_order(Policy::Ep, settings(ranks), &experts);
        let mut group = ParallelSession::open(plain(model, OPTIONS), 1, Box::new(transport), first)?;
        group.count_loads();
        let mut worst = 0.0_f32;
        let mut judge = |got: RankLogits| {
            assert_eq!(got.len(), expected[rank].len());
            got.iter().zip(&expected[rank]).for_each(|(a, b)| worst = worst.max(max_difference(a, b)));
        };
        judge(on_rank(&mut group, model, trace)?);
        let loads = group.take_loads()?;
        let mut done = vec![(Policy::Ep, group.statistics())];
        let placed = |p: &Policy| Ok((*p, ParallelConfig::placed(*p, settings(ranks), &loads, &experts, slots, 1)?));
        let mut configs = policies.iter().map(placed).collect::<Result<Vec<_>, RuntimeError>>()?;
        // Without replicas all that can be done is to send weights.
        configs.push((Policy::Tierwise, ParallelConfig::in_order(Policy::Tierwise, settings(ranks), &experts)));
        for (policy, config) in configs {
            group.configure(config)?;
            // Twice: the second time copies of the first may still be there.
            for _ in 0..2 {
                judge(on_rank(&mut group, model, trace)?);
            }
            done.push((policy, group.statistics()));
        }
        Ok((worst, done))
    };
    let results: Vec<_> = run_threads(ranks, LONG, work).into_iter().map(|r| r.unwrap_or_else(|e| panic!("{e}"))).collect();
    let worst = results.iter().map(|r| r.0).fold(0.0, f32::max);
    (worst, results.into_iter().next().expect("rank 0").1)
}

fn all_alone(model: &Arc<Model>, ranks: usize, trace: Option<&Arc<RoutingTrace>>) -> Vec<RankLogits> {
    (0..ranks).map(|r| alone(model, r, trace)).collect()
}

const OTHERS: [Policy; 4] = [Policy::Eplb, Policy::EplbSplit, Policy::Llep, Policy::Tierwise];

#[test]
fn logits_are_those_of_one_process_on_any_number_of_ranks_under_every_policy() {
    let model = open(&golden("olmoe"));
    let experts = num_experts(&model)[0] as usize;
    let mut sent = [0; 2];
    for trace in [None, Some(skewed(&model))] {
        let trace = trace.as_ref();
        let expected = all_alone(&model, 8, trace);
        for ranks in 1..=8 {
            // LLA wants as many experts on every rank.
            let policies: Vec<Policy> =
                OTHERS.into_iter().filter(|p| *p != Policy::Llep || experts.is_multiple_of(ranks)).collect();
            let (worst, done) = compare(&model, ranks, &policies, trace, &expected);
            println!("{ranks} ranks, skewed {}: {worst:e}", trace.is_some());
            assert!(worst <= 1e-5, "{ranks} ranks: {worst}");
            for (policy, s) in &done {
                println!(
                    "    {:10} {:.3} -> {:.3}, {} experts sent",
                    policy.name(),
                    s.before.imbalance(),
                    s.after.imbalance(),
                    s.experts_sent
                );
                assert_eq!(s.before.rows.iter().sum::<u64>(), s.after.rows.iter().sum::<u64>(), "rows are lost");
                assert!(*policy != Policy::Tierwise || s.after.sum_of_largest <= s.before.sum_of_largest);
                sent[0] += if *policy == Policy::Llep { s.experts_sent } else { 0 };
                sent[1] += if *policy == Policy::Tierwise { s.experts_sent } else { 0 };
            }
        }
    }
    assert!(sent.iter().all(|n| *n > 0), "no weights ever moved: {sent:?}");
}

#[test]
fn every_family_and_routing_rule_runs_on_four_ranks() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(data.join("families"))
        .expect("the families' models")
        .map(|e| e.expect("readable").path().join("model-f16.gguf"))
        .filter(|p| p.is_file())
        .collect();
    assert!(paths.len() >= 12, "the families' models are missing");
    let temporary = tempfile::tempdir().expect("created");
    for rule in ["top_p", "dynamoe", "chain", "chain_top_p"] {
        paths.push(write_safetensors_of(&data.join("routing_rules").join(rule), temporary.path()));
    }
    for path in paths {
        let model = open(&path);
        let expected = all_alone(&model, 4, None);
        let (worst, done) = compare(&model, 4, &[Policy::Tierwise], None, &expected);
        println!("{}: {worst:e}, {} experts sent", path.display(), done[2].1.experts_sent);
        // Kernels for many tokens add in another order than those for few; a recurrent state carries that through all later tokens, and
        // with quantised weights a last bit can decide to which side an activation is rounded.
        // In float32 nothing of this happens.
        let has = |what: fn(QuantFormat) -> bool| model.spec().tensors.iter().any(|t| what(t.format));
        let bound = match () {
            () if has(|f| f.layout().elems > 1) => 1e-2,
            () if has(|f| f != QuantFormat::F32) => 1e-3,
            () => 1e-5,
        };
        assert!(worst <= bound, "{}: {worst}", path.display());
    }
}

#[test]
fn quantised_experts_differ_by_rounding_only() {
    let Some(tiny) = tiny() else { return };
    for file in ["tiny-q8_0.gguf", "tiny-q4_k_m.gguf", "tiny-f16.gguf"] {
        let model = open(&tiny.join(file));
        let trace = skewed(&model);
        let expected = all_alone(&model, 4, Some(&trace));
        let (worst, done) = compare(&model, 4, &OTHERS, Some(&trace), &expected);
        let largest = expected.iter().flatten().flatten().fold(0.0_f32, |m, x| m.max(x.abs()));
        println!("{file}: {worst:e} of {largest}, {} experts sent", done[5].1.experts_sent);
        // Kernels for many tokens add in another order than those for few, and an expert has more tokens here than in one process: a last
        // bit, after which eight-bit activations may be rounded to the other side. Kernels without that choice give the same bits.
        let bound = largest.max(1.0) * if file.contains("f16") { 1e-5 } else { 0.25 };
        assert!(worst <= bound, "{file}: {worst}");
    }
}

#[test]
fn ranks_that_differ_or_fail_end_the_job_with_a_reason() {
    let model = open(&golden("olmoe"));
    let experts = num_experts(&model);
    let errors = |work: &(dyn Fn(ParallelSession) -> Result<(), RuntimeError> + Sync),
                  config: &(dyn Fn(usize) -> ParallelConfig + Sync)| {
        let results = run_threads(3, LONG, |transport| {
            let config = config(transport.rank());
            work(ParallelSession::open(plain(&model, OPTIONS), 1, Box::new(transport), config)?)
        });
        results.into_iter().map(|r| r.err().map(|e| e.to_string())).collect::<Vec<_>>()
    };
    let ep = |_: usize| ParallelConfig::in_order(Policy::Ep, settings(3), &experts);

    let other_policy = |rank: usize| {
        let policy = if rank == 1 { Policy::Tierwise } else { Policy::Ep };
        ParallelConfig::in_order(policy, settings(3), &experts)
    };
    let found = errors(&|_| Ok(()), &other_policy);
    assert!(
        found.iter().flatten().any(|e| e.contains("rank 1: runs with the policy tierwise, rank 0 with the policy ep")),
        "{found:?}"
    );

    let other_placement = |rank: usize| {
        let mut config = ep(rank);
        if rank == 2 {
            config.slots[0].swap(0, 1);
        }
        config
    };
    let found = errors(&|_| Ok(()), &other_placement);
    assert!(found.iter().flatten().any(|e| e.contains("runs with a placement of hash")), "{found:?}");

    let too_few = |rank: usize| {
        let mut config = ep(rank);
        config.slots[1][0].pop();
        config
    };
    let found = errors(&|_| Ok(()), &too_few);
    assert!(found.iter().all(|e| e.as_ref().is_some_and(|e| e.contains("the devices that hold expert"))), "{found:?}");

    // One that leaves, one that has more tokens than its context: everyone hears of it.
    let leaves = |mut group: ParallelSession| if group.rank() == 2 { Ok(()) } else { group.prefill(&[1, 2, 3]).map(drop) };
    let found = errors(&leaves, &ep);
    assert!(found[..2].iter().all(|e| e.as_ref().is_some_and(|e| e.contains("rank 2: is gone"))), "{found:?}");
    let too_long = |mut group: ParallelSession| {
        let tokens = vec![1; if group.rank() == 1 { 200 } else { 3 }];
        group.prefill(&tokens).map(drop)
    };
    let found = errors(&too_long, &ep);
    assert!(found.iter().all(|e| e.as_ref().is_some_and(|e| e.contains("tokens do not fit the context of 128"))), "{found:?}");
}
