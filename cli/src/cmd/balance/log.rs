//! The loads that `balance` is asked about: counts, traces and dumps, as steps of tokens per expert.

use super::BalanceArgs;
use crate::ui::Ui;
use anyhow::{Context, Result, bail};
use std::io::Read;
use std::path::Path;
use tierwise_cost::model::ModelSpec;
use tierwise_planner::balance::affinity::Affinity;
use tierwise_planner::balance::loads::Loads;
use tierwise_planner::routing::{CountsTable, Imported, Provenance};
use tierwise_runtime::trace::{ImportOptions, import_bytes, import_routing, read_routing};

/// Tokens in a step of a trace, unless said otherwise.
const TOKENS_PER_STEP: u32 = 1024;

/// What a load file says.
pub struct Log {
    /// Steps of loads.
    pub loads: Loads,
    /// As its author calls it, or `--model`.
    pub model: String,
    /// Steps that placements are made from; 0: all, and judged on themselves.
    pub train_steps: usize,
    /// Pairs of experts, where tokens are known.
    pub affinity: Option<Affinity>,
}

/// The loads that the arguments name.
pub fn read_log(args: &BalanceArgs, spec: Option<&ModelSpec>, ui: &Ui) -> Result<Log> {
    if !(0.0..1.0).contains(&args.train) {
        bail!("--train {}: expected a share from 0 to below 1", args.train);
    }
    let path = Path::new(&args.load);
    let options = ImportOptions {
        provenance: Provenance { model: "not stated".into(), ..Provenance::default() },
        num_experts: spec.and_then(|s| s.moe_layers().next()).map(|(_, m)| m.num_experts),
        select: args.select.clone(),
    };
    let routing = if path.extension().is_some_and(|e| e == "twtrace") {
        Imported::Trace(read_routing(path)?)
    } else {
        let import = if args.load == "-" {
            let mut bytes = Vec::new();
            std::io::stdin().read_to_end(&mut bytes).context("read standard input")?;
            import_bytes(path, &bytes, None, &options)?
        } else {
            import_routing(path, None, &options)?
        };
        import.notes.iter().for_each(|n| ui.detail(n));
        import.routing
    };
    let with_path = || args.load.clone();
    let log = match routing {
        Imported::Trace(trace) => {
            if args.group.is_some() || args.judge.is_some() {
                bail!("{}: --group and --judge choose groups of counts, and this is a trace", args.load);
            }
            let tokens = args.tokens_per_step.unwrap_or(TOKENS_PER_STEP) as usize;
            let loads = Loads::from_trace(&trace, &trace.all(), tokens).with_context(with_path)?;
            let train_steps = train_steps(loads.num_steps(), args.train);
            let affinity = Some(Affinity::from_trace(&trace, &trace.all()));
            Log { loads, model: trace.model, train_steps, affinity }
        }
        Imported::Counts(table) => {
            let table = match spec {
                Some(spec) => moe_rows_only(table, spec),
                None => table,
            };
            let mut loads = Loads::from_counts(&table, args.group.as_deref()).with_context(with_path)?;
            let mut train = train_steps(loads.num_steps(), args.train);
            if let Some(judge) = &args.judge {
                train = loads.num_steps();
                loads = loads.then(&Loads::from_counts(&table, Some(judge)).with_context(with_path)?)?;
            }
            if let Some(tokens) = args.tokens_per_step {
                let k = table.experts_per_token.or(spec.and_then(|s| s.moe_layers().next()).map(|(_, m)| m.experts_per_token));
                let Some(k) = k else {
                    bail!(
                        "{}: does not say how many experts a token chooses; expected --model with --tokens-per-step",
                        args.load
                    );
                };
                loads = loads.scaled(u64::from(tokens) * u64::from(k));
            }
            Log { loads, model: table.model, train_steps: train, affinity: None }
        }
    };
    Ok(Log { model: spec.map_or(log.model, |s| s.name.clone()), ..log })
}

/// Without the rows of dense layers, where a table has them.
fn moe_rows_only(mut table: CountsTable, spec: &ModelSpec) -> CountsTable {
    if table.num_moe_layers == spec.layers.len() && spec.moe_layers().count() < spec.layers.len() {
        let moe: Vec<usize> = spec.moe_layers().map(|(l, _)| l as usize).collect();
        for group in &mut table.groups {
            group.counts = moe.iter().map(|l| group.counts[*l].clone()).collect();
        }
        table.num_moe_layers = moe.len();
    }
    table
}

fn train_steps(steps: usize, share: f64) -> usize {
    if steps < 2 || share == 0.0 { 0 } else { ((steps as f64 * share).round() as usize).clamp(1, steps - 1) }
}
