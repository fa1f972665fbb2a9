// Where an expert's matrices begin in the bound part of the arena, which is from place `first_place` on (a place is 16 bytes). An expert
// belongs to the part in whose first `places` places it begins; `false` if this is not that part.

fn find_expert(expert: u32, start: ptr<function, vec3<u32>>) -> bool {
    if expert >= p.num_experts {
        return false;
    }
    let places = vec3<u32>(table[3u * expert], table[3u * expert + 1u], table[3u * expert + 2u]);
    let first = min(places.x, min(places.y, places.z));
    if first < p.first_place || first - p.first_place >= p.places {
        return false;
    }
    *start = (places - p.first_place) * 16u;
    return true;
}
