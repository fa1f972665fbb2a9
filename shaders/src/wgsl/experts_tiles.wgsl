// A workgroup's tile: up to 32 rows of one expert, and 32 rows of its matrices from `first` on.

struct Tile {
    expert: u32,
    count: u32,
    first: u32,
    start: vec3<u32>,
}

var<workgroup> row_of: array<u32, 32>;

// `false` where there is nothing to do, in all lanes alike.
fn find_tile(group: vec3<u32>, groups: vec3<u32>, lane: u32, tile: ptr<function, Tile>) -> bool {
    let number = group.z * groups.y + group.y;
    if number >= p.num_tiles {
        return false;
    }
    let place = tiles[3u * number + 1u];
    var start: vec3<u32>;
    if !find_expert(tiles[3u * number], &start) {
        return false;
    }
    *tile = Tile(tiles[3u * number], tiles[3u * number + 2u], 32u * group.x, start);
    if lane < 32u {
        row_of[lane] = order[place + min(lane, (*tile).count - 1u)];
    }
    workgroupBarrier();
    return true;
}
