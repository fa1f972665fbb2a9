// Sums and maxima over the invocations of a workgroup by halving; every lane gets the result.

var<workgroup> lane_values: array<vec4<f32>, LANES>;

fn sum_lanes(lane: u32, value: vec4<f32>) -> vec4<f32> {
    lane_values[lane] = value;
    workgroupBarrier();
    for (var stride = LANES / 2u; stride > 0u; stride /= 2u) {
        if lane < stride {
            lane_values[lane] += lane_values[lane + stride];
        }
        workgroupBarrier();
    }
    let sum = lane_values[0];
    workgroupBarrier();
    return sum;
}

fn max_lanes(lane: u32, value: f32) -> f32 {
    lane_values[lane].x = value;
    workgroupBarrier();
    for (var stride = LANES / 2u; stride > 0u; stride /= 2u) {
        if lane < stride {
            lane_values[lane].x = max(lane_values[lane].x, lane_values[lane + stride].x);
        }
        workgroupBarrier();
    }
    let most = lane_values[0].x;
    workgroupBarrier();
    return most;
}
