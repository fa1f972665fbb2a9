//! GGUF bytes made by hand: a builder that shares no code with the crate's writer and can make every kind of wrong file.
#![allow(dead_code, reason = "each test binary uses its part")]

/// A file in pieces; any of them may be false.
#[derive(Clone)]
pub struct Raw {
    pub magic: Vec<u8>,
    pub version: Vec<u8>,
    /// Instead of the true numbers.
    pub num_tensors: Option<u64>,
    pub num_entries: Option<u64>,
    pub entries: Vec<Vec<u8>>,
    pub tensors: Vec<Vec<u8>>,
    pub alignment: usize,
    pub data: Vec<u8>,
}

pub const U8: u32 = 0;
pub const U32: u32 = 4;
pub const F32: u32 = 6;
pub const BOOL: u32 = 7;
pub const STRING: u32 = 8;
pub const ARRAY: u32 = 9;
pub const U64: u32 = 10;

pub fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

pub fn entry(key: &str, type_id: u32, value: &[u8]) -> Vec<u8> {
    [string(key.as_bytes()), type_id.to_le_bytes().to_vec(), value.to_vec()].concat()
}

pub fn array(type_id: u32, count: u64, elements: &[u8]) -> Vec<u8> {
    [&type_id.to_le_bytes()[..], &count.to_le_bytes(), elements].concat()
}

/// `dims` in the file's order: innermost first.
pub fn tensor(name: &[u8], dims: &[u64], type_id: u32, offset: u64) -> Vec<u8> {
    let mut out = string(name);
    out.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
    out.extend(type_id.to_le_bytes());
    out.extend(offset.to_le_bytes());
    out
}

impl Raw {
    /// A small valid file: seven entries and three tensors.
    pub fn good() -> Self {
        let tokens = [string(b"a"), string(b"bc"), string("中".as_bytes())].concat();
        let nested = [array(U8, 2, &[1, 2]), array(U8, 0, &[])].concat();
        Self {
            magic: b"GGUF".to_vec(),
            version: 3u32.to_le_bytes().to_vec(),
            num_tensors: None,
            num_entries: None,
            entries: vec![
                entry("general.architecture", STRING, &string(b"test")),
                entry("test.block_count", U32, &2u32.to_le_bytes()),
                entry("test.scale", F32, &0.5f32.to_le_bytes()),
                entry("test.flag", BOOL, &[1]),
                entry("test.big", U64, &(1u64 << 40).to_le_bytes()),
                entry("test.tokens", ARRAY, &array(STRING, 3, &tokens)),
                entry("test.nested", ARRAY, &array(ARRAY, 2, &nested)),
            ],
            tensors: vec![
                tensor(b"a.weight", &[3, 2], 0, 0),   // F32 [2, 3]: 24 bytes
                tensor(b"b.weight", &[32, 2], 2, 32), // Q4_0 [2, 32]: 36 bytes
                tensor(b"c.weight", &[256], 12, 96),  // Q4_K [256]: 144 bytes
            ],
            alignment: 32,
            data: (0..240u32).map(|i| i as u8).collect(),
        }
    }

    pub fn header(&self) -> Vec<u8> {
        let mut out = [self.magic.clone(), self.version.clone()].concat();
        out.extend(self.num_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.num_entries.unwrap_or(self.entries.len() as u64).to_le_bytes());
        self.entries.iter().chain(&self.tensors).for_each(|piece| out.extend(piece));
        out
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(&self.data);
        out
    }
}
