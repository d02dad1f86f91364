//! Models that are protocol buffers: ONNX, and TensorFlow's saved models and graphs.
//!
//! A protocol buffer has no magic number. What tells is that every field from the first byte on has a number and a type
//! that the format knows, down to names of operators.
//! Spec: field numbers of onnx.proto3 (ModelProto, GraphProto, NodeProto, TensorProto) and of TensorFlow's
//! saved_model.proto, meta_graph.proto, graph.proto, node_def.proto.

use std::io;

use super::super::Format;
use super::super::source::Probe;
use super::{HEAD_BYTES_FIRST, HEAD_BYTES_MORE, Seen, Verdict};

/// One field. The last of a head may be cut; it says so.
struct Field<'a> {
    number: u64,
    value: Value<'a>,
}

enum Value<'a> {
    Number(u64),
    Fixed,
    /// What of it is in the head, and whether that is all.
    Bytes(&'a [u8], bool),
}

/// The fields of a message, as far as the head goes. `None` at something that is no field.
fn fields(mut bytes: &[u8]) -> Option<Vec<Field<'_>>> {
    const FIELDS_MAX: usize = 4096;
    let mut out = Vec::new();
    while !bytes.is_empty() && out.len() < FIELDS_MAX {
        let Some(key) = varint(&mut bytes) else { break };
        let number = key >> 3;
        if number == 0 || number > 1 << 20 {
            return None;
        }
        let value = match key & 7 {
            0 => match varint(&mut bytes) {
                Some(value) => Value::Number(value),
                None => break,
            },
            1 | 5 => {
                let len = if key & 7 == 1 { 8 } else { 4 };
                bytes = bytes.get(len..).unwrap_or_default();
                Value::Fixed
            }
            2 => {
                let Some(len) = varint(&mut bytes) else { break };
                let have = usize::try_from(len).unwrap_or(usize::MAX).min(bytes.len());
                let (body, rest) = bytes.split_at(have);
                bytes = rest;
                Value::Bytes(body, have as u64 == len)
            }
            _ => return None,
        };
        out.push(Field { number, value });
    }
    Some(out)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for (at, byte) in bytes.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * at).min(63);
        if byte & 0x80 == 0 {
            *bytes = &bytes[at + 1..];
            return Some(value);
        }
    }
    None
}

/// Whether the numbers that are bytes, and those that are not, are all of these.
fn known(fields: &[Field], bytes: &[u64], numbers: &[u64]) -> bool {
    fields.iter().all(|field| match field.value {
        Value::Bytes(..) => bytes.contains(&field.number) || numbers.contains(&field.number),
        Value::Number(_) | Value::Fixed => numbers.contains(&field.number),
    })
}

fn bytes_of<'a>(fields: &'a [Field<'a>], number: u64) -> impl Iterator<Item = (&'a [u8], bool)> {
    fields.iter().filter_map(move |field| match field.value {
        Value::Bytes(body, whole) if field.number == number => Some((body, whole)),
        Value::Bytes(..) | Value::Number(_) | Value::Fixed => None,
    })
}

fn number_of(fields: &[Field], number: u64) -> Option<u64> {
    fields.iter().find_map(|field| match field.value {
        Value::Number(value) if field.number == number => Some(value),
        Value::Number(_) | Value::Fixed | Value::Bytes(..) => None,
    })
}

pub(super) fn look(_: &[u8], probe: &mut Probe) -> io::Result<Option<Seen>> {
    // Field 1, a number or bytes: so begin all three.
    if !matches!(probe.head(HEAD_BYTES_FIRST)?.first(), Some(0x08 | 0x0a)) {
        return Ok(None);
    }
    let whole = |head: &[u8]| onnx(head).or_else(|| saved_model(head)).or_else(|| graph(head));
    // Few files begin so and are anything here, hence the second read only where the first leaves it open.
    let first = probe.head(HEAD_BYTES_FIRST)?;
    if fields(first).is_none() {
        return Ok(None);
    }
    Ok(whole(probe.head(HEAD_BYTES_MORE)?))
}

// ---- ONNX ---------------------------------------------------------------------------------------------------------------

fn onnx(head: &[u8]) -> Option<Seen> {
    let model = fields(head)?;
    // ir_version first, producer, domain, versions, doc, graph, opsets, metadata, training, functions, configuration.
    if !known(&model, &[2, 3, 4, 6, 7, 8, 14, 20, 25, 26], &[1, 5]) {
        return None;
    }
    let version = number_of(&model, 1).filter(|version| (1..=64).contains(version))?;
    let (body, _) = bytes_of(&model, 7).next()?;
    let graph = fields(body)?;
    if !known(&graph, &[1, 2, 5, 10, 11, 12, 13, 14, 15, 16], &[]) {
        return None;
    }
    let node = bytes_of(&graph, 1).next().is_some_and(|(node, _)| {
        fields(node).is_some_and(|node| {
            let operator = bytes_of(&node, 4).next();
            known(&node, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], &[]) && operator.is_some_and(|(name, _)| is_operator(name))
        })
    });
    let tensor = || {
        bytes_of(&graph, 5).next().is_some_and(|(tensor, _)| {
            fields(tensor).is_some_and(|tensor| {
                let kind = number_of(&tensor, 2);
                kind.is_some_and(|kind| (1..=40).contains(&kind))
                    && known(&tensor, &[1, 4, 6, 8, 9, 12, 13, 16], &[1, 2, 3, 5, 7, 10, 11, 14])
            })
        })
    };
    (node || tensor()).then(|| Verdict::certain(Format::Onnx, format!("an ONNX model, IR version {version}")))
}

/// `MatMul`, `BiasGelu`, `aten::relu`: letters first, then letters, digits and a few marks.
fn is_operator(name: &[u8]) -> bool {
    (1..=128).contains(&name.len())
        && name[0].is_ascii_alphabetic()
        && name.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b':' | b'.' | b'-' | b'/'))
}

// ---- TensorFlow ---------------------------------------------------------------------------------------------------------

fn saved_model(head: &[u8]) -> Option<Seen> {
    let model = fields(head)?;
    if !known(&model, &[2], &[1]) || number_of(&model, 1) != Some(1) {
        return None;
    }
    let (body, _) = bytes_of(&model, 2).next()?;
    let meta = fields(body)?;
    if !known(&meta, &[1, 2, 3, 4, 5, 6, 7], &[]) {
        return None;
    }
    // Its information: version, operators, tags, the version of TensorFlow.
    let told = bytes_of(&meta, 1).next().is_some_and(|(body, _)| {
        fields(body).is_some_and(|info| {
            let operators = bytes_of(&info, 2).next().is_some_and(|(list, _)| {
                fields(list).is_some_and(|list| {
                    let first = bytes_of(&list, 1).next();
                    let name = first
                        .and_then(|(operator, _)| fields(operator))
                        .and_then(|operator| bytes_of(&operator, 1).next().map(|(name, _)| is_operator(name)));
                    name == Some(true)
                })
            });
            let version = bytes_of(&info, 5)
                .next()
                .is_some_and(|(version, _)| version.first().is_some_and(u8::is_ascii_digit) && version.contains(&b'.'));
            known(&info, &[1, 2, 3, 4, 5, 6, 8], &[7]) && (operators || version)
        })
    });
    let graph = bytes_of(&meta, 2).next().is_some_and(|(body, _)| nodes(body).is_some_and(|count| count > 0));
    (told || graph).then(|| Verdict::certain(Format::TfSavedModel, "a TensorFlow saved model"))
}

/// How many whole nodes of a TensorFlow graph the head holds; `None` if it is none.
fn nodes(head: &[u8]) -> Option<usize> {
    let graph = fields(head)?;
    if !known(&graph, &[1, 2, 4, 5], &[3]) {
        return None;
    }
    let mut count = 0;
    for (body, whole) in bytes_of(&graph, 1) {
        let node = fields(body)?;
        if !known(&node, &[1, 2, 3, 4, 5, 6, 7], &[]) {
            return None;
        }
        let operator = bytes_of(&node, 2).next().map(|(name, _)| is_operator(name) && name[0].is_ascii_uppercase());
        let name = bytes_of(&node, 1)
            .next()
            .is_some_and(|(name, _)| !name.is_empty() && name.iter().all(|byte| (0x21..0x7f).contains(byte)));
        match (name, operator) {
            (true, Some(true)) => count += 1,
            // The last one may be cut before its operator.
            (_, None) if !whole => {}
            _ => return None,
        }
    }
    Some(count)
}

fn graph(head: &[u8]) -> Option<Seen> {
    // Operators that nearly every frozen graph has; without one of them a list of pairs of words would do.
    let usual: [&[u8]; 8] =
        [b"Placeholder", b"Const", b"Identity", b"MatMul", b"Conv2D", b"VariableV2", b"VarHandleOp", b"NoOp"];
    if nodes(head)? < 2 {
        return None;
    }
    let graph = fields(head)?;
    let found = bytes_of(&graph, 1)
        .any(|(body, _)| fields(body).is_some_and(|node| bytes_of(&node, 2).any(|(name, _)| usual.contains(&name))));
    found.then(|| Verdict::certain(Format::TfGraph, "a TensorFlow graph with its constants"))
}

#[cfg(test)]
mod tests {
    use super::super::super::Confidence;
    use super::super::tests::{is, is_not};
    use super::*;

    fn bytes(number: u8, body: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2];
        let mut len = body.len();
        while len >= 0x80 {
            out.push(len as u8 | 0x80);
            len >>= 7;
        }
        out.push(len as u8);
        out.extend_from_slice(body);
        out
    }
    fn number(number: u8, value: u8) -> Vec<u8> {
        vec![number << 3, value]
    }

    fn onnx(operator: &str, kind: u8) -> Vec<u8> {
        let node = [bytes(1, b"x"), bytes(1, b"w"), bytes(2, b"y"), bytes(4, operator.as_bytes())].concat();
        let tensor = [number(1, 64), number(2, kind), bytes(8, b"w"), bytes(9, &[1; 4096])].concat();
        let graph = [bytes(1, &node), bytes(2, b"g"), bytes(5, &tensor)].concat();
        [number(1, 8), bytes(2, b"pytorch"), bytes(7, &graph), bytes(8, &number(2, 17))].concat()
    }

    #[test]
    fn onnx_is_known_by_its_graph_down_to_an_operator_or_a_tensor() {
        is("m", &onnx("MatMul", 1), Format::Onnx, Confidence::Certain);
        is("m", &onnx("MatMul", 1)[..200], Format::Onnx, Confidence::Certain);
        is("m", &onnx("", 1), Format::Onnx, Confidence::Certain);
        is_not("neither", &onnx("9 not an operator", 99));
        let mut version = onnx("MatMul", 1);
        version[1] = 0x7f;
        is_not("another version", &version);
        is_not("without a graph", &[number(1, 8), bytes(2, b"pytorch"), bytes(8, &number(2, 17))].concat());
        is_not("a field that it does not have", &[number(1, 8), bytes(9, b"x"), onnx("MatMul", 1)].concat());
    }

    fn node(name: &str, operator: &str) -> Vec<u8> {
        bytes(1, &[bytes(1, name.as_bytes()), bytes(2, operator.as_bytes()), bytes(5, &[0x0a, 0])].concat())
    }

    #[test]
    fn tensorflow_graphs_and_saved_models_are_known_by_their_nodes() {
        let graph = [node("x", "Placeholder"), node("dense/kernel", "Const"), node("y", "MatMul")].concat();
        is("frozen.pb", &graph, Format::TfGraph, Confidence::Certain);
        is_not("one node", &node("x", "Placeholder"));
        is_not("pairs of words", &[node("x", "Apple"), node("y", "Pear")].concat());
        is_not("lower case", &[node("x", "const"), node("y", "identity")].concat());

        let info = [bytes(2, &bytes(1, &bytes(1, b"AddV2"))), bytes(4, b"serve"), bytes(5, b"2.16.1")].concat();
        let saved = |schema: u8| [number(1, schema), bytes(2, &[bytes(1, &info), bytes(2, &graph)].concat())].concat();
        is("saved_model.pb", &saved(1), Format::TfSavedModel, Confidence::Certain);
        is_not("another schema", &saved(2));
        is_not("nothing within", &[number(1, 1), bytes(2, &bytes(1, b"\x0a\x01x"))].concat());
    }
}
