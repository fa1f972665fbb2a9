// Sums and maxima over the invocations of a workgroup: within subgroups by their own operations, then over the subgroups' results.

var<workgroup> lane_values: array<vec4<f32>, LANES>;
var<private> subgroup: u32;
var<private> subgroups: u32;
var<private> lane_of_subgroup: u32;

fn sum_lanes(lane: u32, value: vec4<f32>) -> vec4<f32> {
    let part = subgroupAdd(value);
    if lane_of_subgroup == 0u {
        lane_values[subgroup] = part;
    }
    workgroupBarrier();
    var sum = lane_values[0];
    for (var i = 1u; i < subgroups; i++) {
        sum += lane_values[i];
    }
    workgroupBarrier();
    return sum;
}

fn max_lanes(lane: u32, value: f32) -> f32 {
    let part = subgroupMax(value);
    if lane_of_subgroup == 0u {
        lane_values[subgroup].x = part;
    }
    workgroupBarrier();
    var most = lane_values[0].x;
    for (var i = 1u; i < subgroups; i++) {
        most = max(most, lane_values[i].x);
    }
    workgroupBarrier();
    return most;
}
