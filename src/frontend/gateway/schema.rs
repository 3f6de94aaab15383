//! The message types that routes use, read from the compiled descriptors once, in the form in which the codec needs them.

use std::collections::HashMap;

use prost::Message;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};

/// The methods that are declared, by path.
pub struct Methods(HashMap<String, MethodTypes>);

/// The names of a method's messages.
#[derive(Debug)]
pub struct MethodTypes {
    pub request: String,
    pub response: String,
    /// Whether the client may send many requests.
    pub takes_stream: bool,
}

impl Methods {
    #[must_use]
    pub fn new(descriptors: &[u8]) -> Self {
        let mut methods = HashMap::new();
        for file in &file_descriptors(descriptors).file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    let types = MethodTypes {
                        request: method.input_type()[1..].to_owned(),
                        response: method.output_type()[1..].to_owned(),
                        takes_stream: method.client_streaming(),
                    };
                    methods.insert(path, types);
                }
            }
        }
        Self(methods)
    }

    #[must_use]
    pub fn get(&self, path: &str) -> Option<&MethodTypes> {
        self.0.get(path)
    }
}

fn file_descriptors(descriptors: &[u8]) -> FileDescriptorSet {
    FileDescriptorSet::decode(descriptors).expect("the build script has encoded the descriptors")
}

/// Which message type of a [`Schema`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TypeId(usize);

/// Message types that refer to each other.
#[derive(Debug, Default)]
pub struct Schema {
    types: Vec<MessageType>,
    by_name: HashMap<String, TypeId>,
}

#[derive(Debug, Default)]
pub struct MessageType {
    /// In the order of their numbers, which is also that of their declaration.
    pub fields: Vec<Field>,
    /// Fields by their names in `.proto` files and by their names in JSON; most have only one name.
    by_name: HashMap<String, usize>,
    /// The full names of the oneofs.
    pub oneofs: Vec<String>,
}

#[derive(Debug)]
pub struct Field {
    pub number: u32,
    /// Its name in `.proto` files, which is what responses contain.
    pub name: String,
    /// Its name in lower camel case, which is what error texts contain.
    pub json_name: String,
    pub kind: Kind,
    pub is_repeated: bool,
    pub oneof: Option<usize>,
}

#[derive(Debug)]
pub enum Kind {
    Bool,
    Int32,
    Int64,
    Uint32,
    Uint64,
    String,
    Bytes,
    Enum(EnumType),
    Message(TypeId),
}

/// The values of an enum, by name and number.
#[derive(Debug)]
pub struct EnumType(Vec<(String, i32)>);

impl Schema {
    /// The schema of these message types, and of those that they use. Names are `package.Message`.
    #[must_use]
    pub fn new(descriptors: &[u8], roots: &[String]) -> Self {
        let files = file_descriptors(descriptors);
        let mut declared = Declared::default();
        for file in &files.file {
            let package = format!(".{}", file.package());
            file.enum_type.iter().for_each(|declaration| declared.add_enum(&package, declaration));
            file.message_type.iter().for_each(|declaration| declared.add_message(&package, declaration));
        }
        let mut schema = Self::default();
        for root in roots {
            schema.add(&declared, &format!(".{root}"));
        }
        schema
    }

    /// The type with this name, which is one of the roots or used by one.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<TypeId> {
        self.by_name.get(&format!(".{name}")).copied()
    }

    #[must_use]
    pub fn get(&self, id: TypeId) -> &MessageType {
        &self.types[id.0]
    }

    fn add(&mut self, declared: &Declared<'_>, name: &str) -> TypeId {
        if let Some(&known) = self.by_name.get(name) {
            return known;
        }
        let id = TypeId(self.types.len());
        self.types.push(MessageType::default());
        self.by_name.insert(name.to_owned(), id);
        let declaration = declared.messages[name];
        let fields: Vec<_> = declaration.field.iter().map(|field| self.field(declared, field)).collect();
        assert!(
            fields.is_sorted_by_key(|field| field.number),
            "{name}: fields are declared in the order of their numbers"
        );
        assert!(fields.len() <= 64, "{name}: a decoder remembers the fields that it has seen in 64 bits");
        let with_name = |name: fn(&Field) -> &String| {
            fields.iter().enumerate().map(move |(index, field)| (name(field).clone(), index))
        };
        let by_name = with_name(|field| &field.name).chain(with_name(|field| &field.json_name)).collect();
        let oneofs = declaration.oneof_decl.iter().map(|oneof| format!("{}.{}", &name[1..], oneof.name())).collect();
        self.types[id.0] = MessageType { fields, by_name, oneofs };
        id
    }

    fn field(&mut self, declared: &Declared<'_>, field: &FieldDescriptorProto) -> Field {
        let kind = match field.r#type() {
            Type::Bool => Kind::Bool,
            Type::Int32 => Kind::Int32,
            Type::Int64 => Kind::Int64,
            Type::Uint32 => Kind::Uint32,
            Type::Uint64 => Kind::Uint64,
            Type::String => Kind::String,
            Type::Bytes => Kind::Bytes,
            Type::Enum => Kind::Enum(EnumType::new(declared.enums[field.type_name()])),
            Type::Message => Kind::Message(self.add(declared, field.type_name())),
            unused @ (Type::Double
            | Type::Float
            | Type::Fixed32
            | Type::Fixed64
            | Type::Sfixed32
            | Type::Sfixed64
            | Type::Sint32
            | Type::Sint64
            | Type::Group) => panic!("no message of a route has a field of type {unused:?}"),
        };
        Field {
            number: u32::try_from(field.number()).expect("field numbers are positive"),
            name: field.name().to_owned(),
            json_name: field.json_name().to_owned(),
            kind,
            is_repeated: field.label() == Label::Repeated,
            oneof: field.oneof_index.map(|index| usize::try_from(index).expect("indexes are positive")),
        }
    }
}

impl MessageType {
    /// A field by either of its names.
    #[must_use]
    pub fn field_named(&self, name: &[u8]) -> Option<usize> {
        self.by_name.get(std::str::from_utf8(name).ok()?).copied()
    }

    #[must_use]
    pub fn field_numbered(&self, number: u32) -> Option<&Field> {
        self.fields.binary_search_by_key(&number, |field| field.number).ok().map(|index| &self.fields[index])
    }
}

impl Field {
    /// Whether a value that is zero or empty differs from one that is absent.
    #[must_use]
    pub fn has_presence(&self) -> bool {
        self.oneof.is_some() || matches!(self.kind, Kind::Message(_))
    }
}

impl EnumType {
    fn new(declaration: &EnumDescriptorProto) -> Self {
        Self(declaration.value.iter().map(|value| (value.name().to_owned(), value.number())).collect())
    }

    #[must_use]
    pub fn number(&self, name: &[u8]) -> Option<i32> {
        self.0.iter().find_map(|(known, number)| (known.as_bytes() == name).then_some(*number))
    }

    #[must_use]
    pub fn name(&self, number: i32) -> Option<&str> {
        self.0.iter().find_map(|(name, known)| (*known == number).then_some(name.as_str()))
    }
}

/// All declarations, by full name with a dot before it, as descriptors refer to them.
#[derive(Default)]
struct Declared<'a> {
    messages: HashMap<String, &'a DescriptorProto>,
    enums: HashMap<String, &'a EnumDescriptorProto>,
}

impl<'a> Declared<'a> {
    fn add_message(&mut self, parent: &str, declaration: &'a DescriptorProto) {
        let name = format!("{parent}.{}", declaration.name());
        declaration.nested_type.iter().for_each(|nested| self.add_message(&name, nested));
        declaration.enum_type.iter().for_each(|nested| self.add_enum(&name, nested));
        self.messages.insert(name, declaration);
    }

    fn add_enum(&mut self, parent: &str, declaration: &'a EnumDescriptorProto) {
        self.enums.insert(format!("{parent}.{}", declaration.name()), declaration);
    }
}
