//! The methods with which a [`Serializer`](serde::Serializer) refuses what it does not accept.

/// Inside an `impl Serializer`, defines the methods of the named groups. Each returns `Err(Self::refusal())`.
macro_rules! refuse {
    ($($group:ident)*) => { $($crate::json::refuse!(@$group);)* };

    (@scalars) => {
        $crate::json::refuse!(@each
            serialize_bool(bool) serialize_i8(i8) serialize_i16(i16) serialize_i32(i32) serialize_i64(i64)
            serialize_i128(i128) serialize_u8(u8) serialize_u16(u16) serialize_u32(u32) serialize_u64(u64)
            serialize_u128(u128) serialize_f32(f32) serialize_f64(f64) serialize_char(char) serialize_str(&str)
            serialize_bytes(&[u8]) serialize_unit_struct(&'static str)
        );
        fn serialize_unit(self) -> Result<Self::Ok, Self::Error> {
            Err(Self::refusal())
        }
        fn serialize_newtype_struct<T: Serialize + ?Sized>(
            self,
            _: &'static str,
            _: &T,
        ) -> Result<Self::Ok, Self::Error> {
            Err(Self::refusal())
        }
    };
    (@options) => {
        fn serialize_none(self) -> Result<Self::Ok, Self::Error> {
            Err(Self::refusal())
        }
        fn serialize_some<T: Serialize + ?Sized>(self, _: &T) -> Result<Self::Ok, Self::Error> {
            Err(Self::refusal())
        }
    };
    (@collections) => {
        type SerializeSeq = Impossible<Self::Ok, Self::Error>;
        type SerializeTuple = Impossible<Self::Ok, Self::Error>;
        type SerializeTupleStruct = Impossible<Self::Ok, Self::Error>;
        type SerializeMap = Impossible<Self::Ok, Self::Error>;

        fn serialize_seq(self, _: Option<usize>) -> Result<Self::SerializeSeq, Self::Error> {
            Err(Self::refusal())
        }
        fn serialize_tuple(self, _: usize) -> Result<Self::SerializeTuple, Self::Error> {
            Err(Self::refusal())
        }
        fn serialize_tuple_struct(
            self,
            _: &'static str,
            _: usize,
        ) -> Result<Self::SerializeTupleStruct, Self::Error> {
            Err(Self::refusal())
        }
        fn serialize_map(self, _: Option<usize>) -> Result<Self::SerializeMap, Self::Error> {
            Err(Self::refusal())
        }
    };
    (@structs) => {
        type SerializeStruct = Impossible<Self::Ok, Self::Error>;

        fn serialize_struct(self, _: &'static str, _: usize) -> Result<Self::SerializeStruct, Self::Error> {
            Err(Self::refusal())
        }
    };
    (@tuple_variants) => {
        type SerializeTupleVariant = Impossible<Self::Ok, Self::Error>;

        fn serialize_tuple_variant(
            self,
            _: &'static str,
            _: u32,
            _: &'static str,
            _: usize,
        ) -> Result<Self::SerializeTupleVariant, Self::Error> {
            Err(Self::refusal())
        }
    };
    (@struct_variants) => {
        type SerializeStructVariant = Impossible<Self::Ok, Self::Error>;

        fn serialize_struct_variant(
            self,
            _: &'static str,
            _: u32,
            _: &'static str,
            _: usize,
        ) -> Result<Self::SerializeStructVariant, Self::Error> {
            Err(Self::refusal())
        }
    };
    (@each $($method:ident($type:ty))*) => {
        $(fn $method(self, _: $type) -> Result<Self::Ok, Self::Error> {
            Err(Self::refusal())
        })*
    };
}

pub(crate) use refuse;
