//! The routing rule: router logits to chosen experts and their weights.
//!
//! Logits become scores (softmax over all experts, or the sigmoid of each). The `k` best are chosen, ties to the lower id
//! (`torch.topk` on the CPU and ggml's stable sort agree on this); a selection bias counts for this choice only, and with groups only
//! experts of the best groups take part. Their scores, without the bias, are the weights: optionally divided by their sum, then
//! scaled. Sources: transformers, `modeling_deepseek_v2.py` (group worth: the best score) and `modeling_deepseek_v3.py` (the sum of the
//! two best).

use crate::kernels::CpuKernels;
use tierwise_cost::model::{GroupScore, Moe, RouterScore, Selection};
use tierwise_planner::engine::SCORE_ONE;

/// A layer's rule with its learnt part.
#[derive(Debug, Clone, Copy)]
pub struct Rule<'a> {
    /// The rule.
    pub moe: &'a Moe,
    /// Added to the scores for the choice: `[num_experts]`.
    pub selection_bias: Option<&'a [f32]>,
}

impl<'a> From<&'a Moe> for Rule<'a> {
    /// A rule without selection bias.
    fn from(moe: &'a Moe) -> Self {
        Self { moe, selection_bias: None }
    }
}

impl Rule<'_> {
    /// One token's logits to scores.
    fn score(&self, kernels: &CpuKernels, row: &mut [f32] /* [num_experts] */) {
        match self.moe.router.score {
            // Of a sparse mixer only what later layers' guesses go by; its choice is `sparse_mixer`.
            RouterScore::Softmax | RouterScore::SparseMixer => kernels.softmax(row),
            RouterScore::Sigmoid => row.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp())),
            RouterScore::SqrtSoftplus => unreachable!("refused by plan_only_reason"),
        }
    }

    /// What the choice goes by: scores with the bias, minus infinity outside the groups that take part.
    fn worths(&self, scores: &[f32] /* [num_experts] */, worths: &mut Vec<f32>) {
        worths.clear();
        worths.extend_from_slice(scores);
        if let Some(bias) = self.selection_bias {
            worths.iter_mut().zip(bias).for_each(|(w, b)| *w += b);
        }
        let router = &self.moe.router;
        let Some((groups, kept)) = router.groups.filter(|(groups, kept)| kept < groups) else { return };
        let size = worths.len() / groups as usize;
        let mut of_groups: Vec<f32> = worths.chunks_exact(size).map(|group| group_worth(router.group_score, group)).collect();
        for _ in 0..kept {
            take_largest(&mut of_groups);
        }
        for (group, worth) in worths.chunks_exact_mut(size).zip(of_groups) {
            if worth != TAKEN {
                group.fill(TAKEN);
            }
        }
    }
}

impl Rule<'_> {
    /// How many of the best experts, best first, the token gets.
    fn kept(&self, best: &[(u32, f32)]) -> usize {
        match self.moe.router.selection {
            Selection::TopK => best.len(),
            Selection::TopP { p } => {
                let mut sum = 0.0;
                let enough = best.iter().position(|(_, score)| {
                    sum += score;
                    sum >= p
                });
                enough.map_or(best.len(), |last| last + 1)
            }
            Selection::Threshold { min_score } => best.iter().take_while(|(_, score)| *score >= min_score).count().max(1),
        }
    }
}

fn group_worth(by: GroupScore, group: &[f32]) -> f32 {
    let mut best = [f32::NEG_INFINITY; 2];
    for w in group {
        if *w > best[0] {
            best = [*w, best[0]];
        } else if *w > best[1] {
            best[1] = *w;
        }
    }
    match by {
        GroupScore::Top2Sum if group.len() > 1 => best[0] + best[1],
        GroupScore::Top2Sum | GroupScore::Max => best[0],
    }
}

/// In the place of an expert, where a token has fewer than others may have.
pub const NO_EXPERT: u32 = u32::MAX;

/// The choice for every token of a step in one layer.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Routing {
    /// Chosen experts, heaviest first, then [`NO_EXPERT`] for a token with fewer: `[tokens, experts_per_token]`.
    pub experts: Vec<u32>,
    /// Their weights, 0 where there is none: `[tokens, experts_per_token]`.
    pub weights: Vec<f32>,
    /// Experts per token, at most.
    pub experts_per_token: usize,
}

impl Routing {
    /// Tokens routed.
    pub fn num_tokens(&self) -> usize {
        self.experts.len().checked_div(self.experts_per_token).unwrap_or(0)
    }

    /// The choice of `rows` tokens from number `first` on.
    #[must_use]
    pub fn rows(&self, first: usize, rows: usize) -> Self {
        let k = self.experts_per_token;
        let of_rows = first * k..(first + rows) * k;
        Self { experts: self.experts[of_rows.clone()].to_vec(), weights: self.weights[of_rows].to_vec(), experts_per_token: k }
    }

    /// Replaces the choice by that for `logits`, which are overwritten.
    pub fn choose(&mut self, kernels: &CpuKernels, rule: Rule<'_>, logits: &mut [f32] /* [tokens, num_experts] */) {
        self.choose_scored(kernels, rule, logits, None);
    }

    /// [`Self::choose`], and what the router makes of the likeliest experts into `sums`.
    pub fn choose_scored(
        &mut self,
        kernels: &CpuKernels,
        rule: Rule<'_>,
        logits: &mut [f32], // [tokens, num_experts]
        mut sums: Option<&mut RouterScores>,
    ) {
        let (num_experts, k) = (rule.moe.num_experts, rule.moe.experts_per_token as usize);
        if let Some(sums) = sums.as_deref_mut() {
            sums.start(num_experts);
        }
        self.experts.clear();
        self.weights.clear();
        self.experts_per_token = k;
        let mut worths = Vec::with_capacity(num_experts as usize);
        let mut chosen: Vec<(u32, f32)> = Vec::with_capacity(k);
        for scores in logits.chunks_exact_mut(num_experts as usize) {
            chosen.clear();
            if rule.moe.router.score == RouterScore::SparseMixer {
                chosen.extend(sparse_mixer(scores));
            }
            rule.score(kernels, scores);
            rule.worths(scores, &mut worths);
            if chosen.is_empty() {
                chosen.extend((0..k).map(|_| take_largest(&mut worths)).map(|e| (e as u32, scores[e])));
            } else {
                chosen.iter().for_each(|(e, _)| worths[*e as usize] = TAKEN);
            }
            if let Some(sums) = sums.as_deref_mut() {
                chosen.iter().for_each(|(e, score)| sums.add(*e as usize, *score));
                sums.add_next(k, scores, &mut worths);
            }
            chosen.truncate(rule.kept(&chosen));
            // With a bias the best choice is not always the heaviest.
            chosen.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let router = &rule.moe.router;
            let sum = if router.normalize_topk { chosen.iter().map(|c| c.1).sum::<f32>() + TINY } else { 1.0 };
            let factor = router.scale / sum;
            self.experts.extend(chosen.iter().map(|c| c.0));
            self.weights.extend(chosen.iter().map(|c| c.1 * factor));
            let missing = k - chosen.len();
            self.experts.extend(std::iter::repeat_n(NO_EXPERT, missing));
            self.weights.extend(std::iter::repeat_n(0.0, missing));
        }
    }
}

/// Logits that are less than the best by more than this share of the larger of the two do not count in a sparse mixer: twice the
/// noise of its training.
const SPARSE_MIXER_NEARNESS: f32 = 0.02;

/// The best expert and the best of the others, each weighted by a softmax over the logits near it (transformers, `sparsemixer`).
fn sparse_mixer(logits: &[f32] /* [num_experts] */) -> [(u32, f32); 2] {
    let mut taken = usize::MAX;
    [0, 1].map(|_| {
        let open = || logits.iter().enumerate().filter(|(e, _)| *e != taken);
        let (best, most) = open().fold((0, f32::NEG_INFINITY), |b, (e, x)| if *x > b.1 { (e, *x) } else { b });
        let near = |x: f32| (most - x) / x.abs().max(most) <= SPARSE_MIXER_NEARNESS;
        let sum: f32 = open().filter(|(_, x)| near(**x)).map(|(_, x)| (x - most).exp()).sum();
        taken = best;
        (best as u32, 1.0 / sum)
    })
}

/// Keeps a sum of sigmoids that all underflow from dividing by zero, as in the reference.
const TINY: f32 = 1e-20;

/// Below every worth: taken, or not taking part.
const TAKEN: f32 = f32::NEG_INFINITY;

/// The place of the largest worth, ties to the lower; it is marked as taken.
fn take_largest(worths: &mut [f32]) -> usize {
    let mut best = 0;
    for (e, worth) in worths.iter().enumerate() {
        if *worth > worths[best] {
            best = e;
        }
    }
    worths[best] = TAKEN;
    best
}

/// Sums over a step's tokens of the router's probabilities, for the first 2 x experts per token of each token: what
/// [`tierwise_planner::engine::Demand::scores`] wants.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct RouterScores {
    /// In units of 1 / [`SCORE_ONE`]; `None` for experts that no token ranks that high. `[num_experts]`
    sums: Vec<Option<u32>>,
}

impl RouterScores {
    fn start(&mut self, num_experts: u32) {
        self.sums.clear();
        self.sums.resize(num_experts as usize, None);
    }

    fn add(&mut self, expert: usize, probability: f32) {
        let units = (probability * SCORE_ONE as f32).round() as u32;
        let sum = &mut self.sums[expert];
        *sum = Some(sum.unwrap_or(0).saturating_add(units));
    }

    /// Adds the best `count` experts that are not taken yet, as far as there are any.
    fn add_next(&mut self, count: usize, scores: &[f32], worths: &mut [f32]) {
        for _ in 0..count {
            if worths.iter().all(|w| *w == TAKEN) {
                break;
            }
            let next = take_largest(worths);
            self.add(next, scores[next]);
        }
    }

    /// Replaces the sums by those for `logits`, which are overwritten.
    pub fn score(&mut self, kernels: &CpuKernels, rule: Rule<'_>, logits: &mut [f32] /* [tokens, num_experts] */) {
        self.start(rule.moe.num_experts);
        let mut worths = Vec::with_capacity(rule.moe.num_experts as usize);
        for scores in logits.chunks_exact_mut(rule.moe.num_experts as usize) {
            rule.score(kernels, scores);
            rule.worths(scores, &mut worths);
            self.add_next(2 * rule.moe.experts_per_token as usize, scores, &mut worths);
        }
    }

    /// (expert, sum), ascending by expert.
    pub fn to_sparse(&self) -> Vec<(u32, u32)> {
        self.sums.iter().enumerate().filter_map(|(e, s)| s.map(|s| (e as u32, s))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tierwise_cost::model::Router;

    fn moe(normalize_topk: bool, scale: f32) -> Moe {
        Moe::plain(4, 2, 1, Router { scale, ..Router::softmax(normalize_topk) })
    }

    #[test]
    fn scores_are_sums_of_probabilities_of_the_first_2k() {
        let ln = |x: f32| x.ln();
        let wide = Moe { num_experts: 6, experts_per_token: 1, ..moe(true, 1.0) };
        // Probabilities 1/2, 1/4, 1/8, 1/16, 1/32, 1/32 and the same backwards.
        let row = [16.0, 8.0, 4.0, 2.0, 1.0, 1.0].map(ln);
        let mut logits: Vec<f32> = row.into_iter().chain(row.into_iter().rev()).collect();
        let (mut routing, mut scores) = (Routing::default(), RouterScores::default());
        let mut again = logits.clone();
        routing.choose_scored(CpuKernels::best(), (&wide).into(), &mut logits, Some(&mut scores));
        assert_eq!(routing.experts, [0, 5]);
        let near = |found: &[(u32, u32)], expected: &[(u32, u32)]| {
            found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| a.0 == b.0 && a.1.abs_diff(b.1) <= 1)
        };
        let expected = [(0, SCORE_ONE / 2), (1, SCORE_ONE / 4), (4, SCORE_ONE / 4), (5, SCORE_ONE / 2)];
        assert!(near(&scores.to_sparse(), &expected), "{:?}", scores.to_sparse());
        let chosen = scores.clone();
        scores.score(CpuKernels::best(), (&wide).into(), &mut again);
        assert_eq!(scores, chosen);
    }

    #[test]
    fn ties_go_to_the_lower_id_and_weights_follow_the_rule() {
        let ln2 = 2.0f32.ln();
        let mut r = Routing::default();
        r.choose(CpuKernels::best(), (&moe(false, 1.0)).into(), &mut [0.0, ln2, ln2, 0.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(r.experts, [1, 2, 0, 1]);
        for (w, expected) in r.weights.iter().zip([1.0 / 3.0, 1.0 / 3.0, 0.25, 0.25]) {
            assert!((w - expected).abs() < 1e-6);
        }
        assert_eq!(r.num_tokens(), 2);
        r.choose(CpuKernels::best(), (&moe(true, 2.0)).into(), &mut [0.0, 2.0 * ln2, ln2, 0.0]);
        assert_eq!(r.experts, [1, 2]);
        assert!((r.weights[0] - 4.0 / 3.0).abs() < 1e-6 && (r.weights[1] - 2.0 / 3.0).abs() < 1e-6);
    }

    /// Every rule against the oracle's, on logits in steps of a quarter: many ties, among experts and among groups. Logits above zero
    /// only, because sigmoid(x) + sigmoid(-x) would tie with twice sigmoid(0) but for rounding.
    #[test]
    fn choices_and_weights_are_those_of_the_obvious_version() {
        let mut state = 1u64;
        let mut random = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % n
        };
        for round in 0..2000 {
            let groups = 1 + random(5) as u32;
            let num_experts = groups * (1 + random(7) as u32);
            let kept = 1 + random(u64::from(groups)) as u32;
            let experts_per_token = 1 + random(u64::from(num_experts / groups * kept)) as u32;
            let router = Router {
                score: if round % 2 == 0 { RouterScore::Softmax } else { RouterScore::Sigmoid },
                normalize_topk: random(2) == 0,
                scale: 1.0 + random(3) as f32 / 2.0,
                bias: false,
                selection_bias: random(2) == 0,
                groups: if random(3) == 0 { None } else { Some((groups, kept)) },
                group_score: if random(2) == 0 { GroupScore::Max } else { GroupScore::Top2Sum },
                selection: Selection::TopK,
            };
            // A number of experts that varies goes with the plain rules. Odd numbers: no sum of scores of quarters hits them.
            let selection = match random(4) {
                0 => Selection::TopP { p: 0.1 + random(90) as f32 / 100.123 },
                1 => Selection::Threshold { min_score: 0.01 + random(90) as f32 / 100.123 },
                _ => Selection::TopK,
            };
            let router = match selection {
                Selection::TopK => router,
                selection => Router { selection_bias: false, groups: None, selection, ..router },
            };
            let mut logits: Vec<f32> = (0..num_experts).map(|_| random(9) as f32 / 4.0).collect();
            let bias: Vec<f32> = (0..num_experts).map(|_| random(1 << 20) as f32 / (1 << 19) as f32 - 1.0).collect();
            let moe = Moe::plain(num_experts, experts_per_token, 1, router);
            let bias = moe.router.selection_bias.then_some(bias.as_slice());
            let wide = |x: &[f32]| ndarray::Array1::from_iter(x.iter().map(|v| f64::from(*v)));
            let expected = super::super::reference::choose(&moe, &wide(&logits).view(), bias.map(wide).as_ref());
            let mut found = Routing::default();
            // Scalar: equal logits have equal scores, as in the oracle.
            found.choose(&CpuKernels::SCALAR, Rule { moe: &moe, selection_bias: bias }, &mut logits);
            let mut ids: Vec<u32> = expected.iter().map(|c| c.0).collect();
            ids.resize(moe.experts_per_token as usize, NO_EXPERT);
            assert_eq!(found.experts, ids, "{moe:?}");
            assert!(found.weights[expected.len()..].iter().all(|w| *w == 0.0), "{moe:?}");
            for (w, (_, expected)) in found.weights.iter().zip(&expected) {
                assert!((f64::from(*w) - expected).abs() < 1e-5 * expected.max(1.0), "{w} {expected} {moe:?}");
            }
        }
    }
}
