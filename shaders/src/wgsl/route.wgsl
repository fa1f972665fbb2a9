// The k best experts of a token and their weights; one workgroup per token. Without selection bias logits rank the experts, with it
// scores plus bias do.

const TAKEN: f32 = -3.4e38;
var<workgroup> worths: array<f32, 1024>;
var<workgroup> best_worth: array<f32, LANES>;
var<workgroup> best_expert: array<u32, LANES>;
var<workgroup> chosen: array<u32, 64>;
var<workgroup> chosen_weight: array<f32, 64>;

fn run(group: vec3<u32>, groups: vec3<u32>, lane: u32) {
    let token = group.y * groups.x + group.x;
    if token >= p.tokens {
        return;
    }
    let first = token * p.num_experts;
    var part = TAKEN;
    for (var e = lane; e < p.num_experts; e += LANES) {
        part = max(part, logits[first + e]);
    }
    let most = max_lanes(lane, part);
    part = 0.0;
    for (var e = lane; e < p.num_experts; e += LANES) {
        part += exp(logits[first + e] - most);
    }
    let sum = sum_lanes(lane, vec4<f32>(part, 0.0, 0.0, 0.0)).x;
    for (var e = lane; e < p.num_experts; e += LANES) {
        worths[e] = logits[first + e];
        if p.has_bias != 0u {
            worths[e] = score(logits[first + e], most, sum) + selection_bias[e];
        }
    }
    workgroupBarrier();
    for (var c = 0u; c < p.k; c++) {
        var worth = TAKEN;
        var expert = min(lane, p.num_experts - 1u);
        for (var e = lane; e < p.num_experts; e += LANES) {
            if worths[e] > worth {
                worth = worths[e];
                expert = e;
            }
        }
        best_worth[lane] = worth;
        best_expert[lane] = expert;
        workgroupBarrier();
        for (var stride = LANES / 2u; stride > 0u; stride /= 2u) {
            if lane < stride {
                let other = best_worth[lane + stride];
                let tie = other == best_worth[lane] && best_expert[lane + stride] < best_expert[lane];
                if other > best_worth[lane] || tie {
                    best_worth[lane] = other;
                    best_expert[lane] = best_expert[lane + stride];
                }
            }
            workgroupBarrier();
        }
        if lane == 0u {
            chosen[c] = best_expert[0];
            chosen_weight[c] = score(logits[first + best_expert[0]], most, sum);
            worths[best_expert[0]] = TAKEN;
        }
        workgroupBarrier();
    }
    if lane == 0u {
        finish(token);
    }
}

fn score(logit: f32, most: f32, sum: f32) -> f32 {
    if p.sigmoid != 0u {
        return sigmoid(logit);
    }
    // Over the chosen alone: they are divided by their own sum, which the factor cancels from.
    let e = exp(logit - most);
    return select(e / sum, e, p.softmax_after_topk != 0u);
}

fn finish(token: u32) {
    var sum = 0.0;
    for (var c = 0u; c < p.k; c++) {
        sum += chosen_weight[c];
    }
    var factor = p.scale;
    if p.softmax_after_topk != 0u && p.sigmoid == 0u {
        factor /= sum;
    } else if p.normalize != 0u {
        factor /= sum + 1e-20;
    }
    if p.has_bias != 0u {
        // With a bias the best choice is not always the heaviest.
        for (var c = 1u; c < p.k; c++) {
            let weight = chosen_weight[c];
            let expert = chosen[c];
            var at = c;
            while at > 0u {
                let other = chosen_weight[at - 1u];
                if other > weight || (other == weight && chosen[at - 1u] < expert) {
                    break;
                }
                chosen_weight[at] = other;
                chosen[at] = chosen[at - 1u];
                at -= 1u;
            }
            chosen_weight[at] = weight;
            chosen[at] = expert;
        }
    }
    for (var c = 0u; c < p.k; c++) {
        ids[token * p.k + c] = chosen[c];
        weights[token * p.k + c] = chosen_weight[c] * factor;
    }
}
