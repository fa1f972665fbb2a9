//! The simulation against LLEP's published figure, policies against each other, and the losing regime of LLEP.

use serde_json::Value;
use tierwise_planner::balance::cost::{LayerCost, Rates};
use tierwise_planner::balance::fig4::{MODELS, TOKENS, cell};
use tierwise_planner::balance::holders::LayerPlacement;
use tierwise_planner::balance::loads::Loads;
use tierwise_planner::balance::place::{DeviceSpec, PlaceOptions};
use tierwise_planner::balance::replay::{Policy, PolicyResult, ReplaySettings, replay};
use tierwise_planner::balance::spill::{HOST, SpillCache, SpillSettings, Spiller};

#[test]
fn llep_figure_4_is_reproduced_and_never_lost_to() {
    let fixture: Value = serde_json::from_str(include_str!("data/balance/llep_fig4.json")).expect("JSON");
    let (mut squares, mut worst_gb, mut n) = (0.0_f64, 0.0_f64, 0.0);
    println!(
        "{:13} {:>4} {:>5}  {:>9} {:>9} {:>6}  {:>9} {:>9}  transfers",
        "model", "hot", "share", "published", "simulated", "ours", "GB publ.", "GB"
    );
    let mut by_model = [(0.0, 0.0, 0.0); 3];
    for bar in fixture["cells"].as_array().expect("cells") {
        let at = MODELS.iter().position(|m| bar["model"] == m.name).expect("a model of the figure");
        let get = |key: &str| bar[key].as_f64().expect("a number");
        let hot = get("hot_experts") as usize;
        let c = cell(&MODELS[at], TOKENS, hot, get("hot_share"), 8).expect("experts divide");
        let (simulated, ours) = (c.ep_s / c.llep_s, c.ep_s / c.ours_s);
        println!(
            "{:13} {hot:4} {:5.2}  {:9.2} {simulated:9.2} {ours:6.2}  {:9.2} {:9.2}  {} and {}",
            MODELS[at].name,
            get("hot_share"),
            get("speedup"),
            get("ep_gb"),
            c.ep_gb,
            c.llep_transfers,
            c.our_transfers
        );
        let error = simulated - get("speedup");
        squares += error * error;
        n += 1.0;
        by_model[at].0 += error * error;
        by_model[at].1 += get("speedup") * simulated;
        by_model[at].2 += simulated * simulated;
        worst_gb = worst_gb.max((c.ep_gb - get("ep_gb")).abs());
        assert!(c.ours_s <= c.llep_s * (1.0 + 1e-9), "{bar}: {c:?}");
        assert!(c.ours_s <= c.ep_s * (1.0 + 1e-9), "{bar}: {c:?}");
        assert!(2 * c.our_transfers <= c.llep_transfers, "{bar}: {c:?}");
    }
    for (model, (squares, up, down)) in MODELS.iter().zip(by_model) {
        println!("{}: rmse {:.3}, a factor of {:.3} would fit best", model.name, (squares / 15.0_f64).sqrt(), up / down);
    }
    let rmse = (squares / n).sqrt();
    println!("speedup rmse {rmse:.3}, memory of plain EP within {worst_gb:.2} GB");
    assert!(rmse <= 0.3, "{rmse}");
    assert!(worst_gb <= 0.2, "{worst_gb}");
}

#[test]
fn nothing_is_lost_where_llep_loses() {
    // At most 8K tokens per GPU, at most 30 % imbalance: the published losing regime, and around it.
    let mut llep_lost = 0;
    for model in &MODELS {
        for tokens_per_gpu in [512, 2048, 8192, 16_384] {
            for share in [0.05, 0.1, 0.2, 0.3] {
                let c = cell(model, tokens_per_gpu * 8, 4, share, 8).expect("experts divide");
                assert!(c.ours_s <= c.ep_s * (1.0 + 1e-9), "{} {tokens_per_gpu} {share}: {c:?}", model.name);
                assert!(c.ours_s <= c.llep_s * (1.0 + 1e-9), "{} {tokens_per_gpu} {share}: {c:?}", model.name);
                llep_lost += u32::from(c.llep_s > c.ep_s);
            }
        }
    }
    println!("LLEP is slower than plain EP in {llep_lost} of 48");
    assert!(llep_lost > 0, "the regime is not in the simulation");
}

#[test]
fn copies_obey_memory_and_are_used_again() {
    let cost = LayerCost::new(2880, 2880, 2.0, &Rates::h200());
    let holders = LayerPlacement::contiguous(16, 4).expect("divides").holders(16);
    let mut tokens = vec![1000_u64; 16];
    tokens[0] = 400_000;
    let settings =
        |slots_per_device, max_rows| SpillSettings { min_tokens: 64, slots_per_device, max_rows, host_bytes_per_s: 0.0 };
    let mut spiller = Spiller::default();
    let mut plan = |s: &SpillSettings, cache: &mut SpillCache| spiller.plan(&holders, &tokens, &[1.0; 4], &cost, s, cache, 3);
    // No slots, no copies.
    let none = plan(&settings(0, u64::MAX), &mut SpillCache::new(4, 0));
    assert!(none.copies.is_empty() && none.seconds == none.without);
    // Three copies level four devices; the second step uses them without sending.
    let mut cache = SpillCache::new(4, 1);
    let first = plan(&settings(1, u64::MAX), &mut cache);
    assert_eq!(first.copies.len(), 3, "{first:?}");
    assert!(first.seconds.total() < first.without.total());
    let second = plan(&settings(1, u64::MAX), &mut cache);
    assert!(second.copies.is_empty() && second.seconds.total() < first.seconds.total());
    assert!((0..4).all(|g| cache.of(g).count() <= 1), "never more copies than slots");
    assert_eq!(second.share.iter().sum::<u64>(), tokens.iter().sum::<u64>());
    // From hosts where links are slower; never slower with them.
    let with_hosts = SpillSettings { host_bytes_per_s: 2.0 * cost.rates.link_bytes_per_s, ..settings(1, u64::MAX) };
    let hosted = plan(&with_hosts, &mut SpillCache::new(4, 1));
    assert!(hosted.copies.len() == 3 && hosted.copies.iter().all(|c| c.source == HOST), "{hosted:?}");
    assert!(hosted.seconds.transfer_s < first.seconds.transfer_s, "three copies on three wires, not on one");
    let slow_hosts = SpillSettings { host_bytes_per_s: 0.1 * cost.rates.link_bytes_per_s, ..settings(1, u64::MAX) };
    assert!(plan(&slow_hosts, &mut SpillCache::new(4, 1)).seconds.total() <= first.seconds.total() * (1.0 + 1e-9));
    // Helpers that are full take nothing.
    let full = plan(&settings(1, 4000), &mut SpillCache::new(4, 1));
    assert!(full.copies.is_empty(), "{full:?}");
}

fn settings(devices: usize, slots: u32, cost: LayerCost, train_steps: usize) -> ReplaySettings {
    ReplaySettings {
        devices: vec![DeviceSpec { node: 0, inverse_speed: 1.0, slots }; devices],
        num_nodes: 1,
        num_groups: 1,
        cost,
        train_steps,
        rebalance_every: 0,
        windows: 4,
        place: PlaceOptions::default(),
        spill: SpillSettings { min_tokens: 1024, slots_per_device: 4, max_rows: u64::MAX, host_bytes_per_s: 0.0 },
        alpha: 1.0,
        lambda: 1.3,
        row_bytes: 0.0,
        layer_slots: Vec::new(),
        tolerance: 0.01,
        affinity: None,
        pair_price: 0.0,
        packs: Vec::new(),
    }
}

/// Steps of one layer whose hot expert wanders slowly.
fn wandering() -> Loads {
    let steps: Vec<Vec<Vec<u64>>> = (0..24_usize)
        .map(|t| {
            (0..2)
                .map(|l| (0..32_usize).map(|e| 2000 + 60_000 / (1 + (e + 32 - (t / 6 + l) % 32) % 32) as u64).collect())
                .collect()
        })
        .collect();
    Loads::new(&steps).expect("a good log")
}

#[test]
fn replays_agree_with_hand_counts_and_order_policies() {
    let cost = LayerCost::new(2880, 2880, 2.0, &Rates::h100());
    let log = wandering();
    let set = settings(4, 9, cost, 6);
    let run = |policy| replay(&log, policy, &set).expect("replays");
    let all: Vec<PolicyResult> = Policy::ALL.iter().map(|(_, p)| run(*p)).collect();
    // Plain expert parallelism by hand.
    let (mut mean, mut most) = (0.0, 0.0);
    for step in 6..24 {
        for layer in 0..2 {
            let loads: Vec<u64> = log.row(step, layer).chunks(8).map(|c| c.iter().sum()).collect();
            mean += loads.iter().sum::<u64>() as f64 / 4.0;
            most += loads.iter().copied().max().expect("devices") as f64;
        }
    }
    assert!((all[0].balance.aggregate_balancedness - mean / most).abs() < 1e-12);
    for r in &all {
        println!(
            "{:10} {:.1} us, balanced {:.3}, {} transfers",
            r.policy,
            r.step_s * 1e6,
            r.balance.aggregate_balancedness,
            r.transfers
        );
        let total: u64 = r.last_loads.iter().flatten().sum();
        assert_eq!(
            total,
            (0..2).map(|l| log.row(23, l).iter().sum::<u64>()).sum::<u64>(),
            "{}: every token is computed",
            r.policy
        );
        assert!((r.compute_s + r.all_to_all_s + r.transfer_s - r.step_s).abs() < 1e-12);
    }
    let [ep, eplb, split, llep, ours] = [0, 1, 2, 3, 4].map(|i| all[i].step_s);
    assert!(split <= eplb && ours <= split.min(ep).min(llep), "{:?}", all.iter().map(|r| r.step_s).collect::<Vec<_>>());
    assert_eq!((all[0].transfers, all[1].transfers, all[2].transfers), (0, 0, 0));
    // Placing anew moves weights, and is paid for.
    let again = ReplaySettings { rebalance_every: 6, ..settings(4, 9, cost, 6) };
    let eplb_again = replay(&log, Policy::Eplb, &again).expect("replays");
    let ours_again = replay(&log, Policy::Tierwise, &again).expect("replays");
    assert!(eplb_again.transfers > 0 && eplb_again.transfer_s > 0.0);
    assert!(ours_again.transfers < eplb_again.transfers, "{} and {}", ours_again.transfers, eplb_again.transfers);
}

#[test]
fn impossible_replays_are_refused_by_name() {
    let cost = LayerCost::new(64, 64, 2.0, &Rates::h100());
    let log = wandering();
    let mut uneven = settings(4, 9, cost, 6);
    uneven.devices[1].slots = 12;
    #[rustfmt::skip]
    let table = [
        (Policy::Ep, settings(5, 9, cost, 6), "devices is 5, expected a divisor of 32"),
        (Policy::Eplb, settings(4, 7, cost, 6), "replicas is 28, expected 32"),
        (Policy::Tierwise, settings(4, 7, cost, 6), "slots for experts is 28, expected 32"),
        (Policy::Ep, settings(4, 9, cost, 24), "steps to place from is 24, expected fewer than 24"),
        (Policy::Eplb, uneven, "slots of the devices is not all alike"),
    ];
    for (policy, settings, message) in table {
        let error = replay(&log, policy, &settings).expect_err(message).to_string();
        assert!(error.contains(message), "{error}");
    }
    #[rustfmt::skip]
    let logs: [(&[Vec<Vec<u64>>], &str); 5] = [
        (&[], "the log is 0 layers"),
        (&[vec![]], "the log is 0 layers"),
        (&[vec![vec![1, 2]], vec![]], "layers of step 1 is 0, expected 1"),
        (&[vec![vec![1, 2]], vec![vec![1]]], "experts of step 1, layer 0 is 1, expected 2"),
        (&[vec![vec![u64::MAX, 2]]], "tokens of step 0, layer 0 is more than"),
    ];
    for (steps, message) in logs {
        let error = Loads::new(steps).expect_err(message).to_string();
        assert!(error.contains(message), "{error}");
    }
}
