// Causal attention of one token's head per workgroup: blocks of LANES positions with a running maximum and sum (arXiv 1805.02867).
// Scores: a lane has a position. Values: a lane has pairs of elements. With PARTS a workgroup has a range of a row's positions, and what it
// found is put together by attention_join.wgsl: per row and range the weighted values, then the maximum and the sum.

const LEAST: f32 = -1e30;
var<workgroup> query: array<vec2<f32>, 512>;
var<workgroup> attended: array<vec2<f32>, 512>;
var<workgroup> weights: array<f32, LANES>;

fn run(group: vec3<u32>, groups: vec3<u32>, lane: u32) {
    let part = group.y * groups.x + group.x;
    let row = part / p.ranges;
    let range = part % p.ranges;
    if row >= p.tokens * p.heads {
        return;
    }
    let head = row % p.heads;
    let kv_head = head / p.heads_per_kv_head;
    var end = p.past + row / p.heads + 1u;
    var begin = max(end, p.window) - p.window;
    if p.chunk != 0u {
        begin = max(begin, (end - 1u) / p.chunk * p.chunk);
    }
    if PARTS {
        let length = (end - begin + p.ranges - 1u) / p.ranges;
        begin = min(begin + range * length, end);
        end = min(begin + length, end);
    }
    for (var i = lane; i < p.key_dim / 2u; i += LANES) {
        query[i] = vec2<f32>(q[row * p.key_dim + 2u * i], q[row * p.key_dim + 2u * i + 1u]);
    }
    for (var i = lane; i < p.value_dim / 2u; i += LANES) {
        attended[i] = vec2<f32>();
    }
    // A sink is as if it had been seen first: its exponential is in the sum, its value is nothing.
    var most = LEAST;
    var sum = 0.0;
    if p.has_sinks != 0u && range == 0u {
        most = sinks[head];
        sum = 1.0;
    }
    workgroupBarrier();
    for (var start = begin; start < end; start += LANES) {
        let position = start + lane;
        var score = LEAST;
        if position < end {
            let key = (position * p.kv_heads + kv_head) * p.key_dim;
            var product = 0.0;
            for (var i = 0u; i < p.key_dim / 2u; i++) {
                product += dot(query[i], key2(key + 2u * i));
            }
            score = capped(product * p.scale, p.softcap);
        }
        let new_most = max(most, max_lanes(lane, score));
        var weight = 0.0;
        if position < end {
            weight = exp(score - new_most);
        }
        weights[lane] = weight;
        let block_sum = sum_lanes(lane, vec4<f32>(weight, 0.0, 0.0, 0.0)).x;
        let rescale = exp(max(most - new_most, -100.0));
        sum = sum * rescale + block_sum;
        most = new_most;
        let count = min(LANES, end - start);
        for (var i = lane; i < p.value_dim / 2u; i += LANES) {
            var v = attended[i] * rescale;
            for (var j = 0u; j < count; j++) {
                v += weights[j] * value2(((start + j) * p.kv_heads + kv_head) * p.value_stride + 2u * i);
            }
            attended[i] = v;
        }
        workgroupBarrier();
    }
    // In all lanes alike.
    var divisor = sum;
    var first = row * p.value_dim;
    if PARTS {
        divisor = 1.0;
        first = part * (p.value_dim + 2u);
        if lane == 0u {
            out[first + p.value_dim] = most;
            out[first + p.value_dim + 1u] = sum;
        }
    }
    for (var i = lane; i < p.value_dim / 2u; i += LANES) {
        let v = attended[i] / divisor;
        out[first + 2u * i] = v.x;
        out[first + 2u * i + 1u] = v.y;
    }
}
