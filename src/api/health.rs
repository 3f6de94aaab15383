//! gRPC's health checking service. Its only service is the server as a whole, with the empty name, which is serving for as
//! long as the server can answer at all. `/health` tells whether the cluster works.

use std::{collections::HashMap, sync::Arc};

use prost::Message;

use super::{Api, decode, decode_streamed};
use crate::{
    call::{Call, CallError, Code, Conversation, Metadata, Reply, Step, StreamIo},
    proto::health::{
        HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse,
        health_check_response::ServingStatus,
    },
};

impl Api {
    /// `Health/Check`.
    pub fn health_check(self: &Arc<Self>, call: Call, reply: Reply) {
        reply.answer(match decode::<HealthCheckRequest>(call.message) {
            Ok(request) if request.service.is_empty() => Ok(serving().encode_to_vec().into()),
            Ok(_) => Err(CallError { code: Code::NotFound, message: "unknown service".into() }),
            Err(error) => Err(error.into()),
        });
    }

    /// `Health/List`.
    pub fn health_list(self: &Arc<Self>, call: Call, reply: Reply) {
        let statuses = HashMap::from([(String::new(), serving())]);
        reply.answer(match decode::<HealthListRequest>(call.message) {
            Ok(_) => Ok(HealthListResponse { statuses }.encode_to_vec().into()),
            Err(error) => Err(error.into()),
        });
    }

    /// `Health/Watch`: after the first response nothing changes until the stream ends.
    pub fn health_watch(self: &Arc<Self>, _metadata: Metadata) -> Box<dyn Conversation> {
        Box::new(HealthWatch { is_answered: false })
    }
}

fn serving() -> HealthCheckResponse {
    HealthCheckResponse { status: ServingStatus::Serving as i32 }
}

struct HealthWatch {
    is_answered: bool,
}

impl Conversation for HealthWatch {
    fn step(&mut self, line: &mut dyn StreamIo) -> Step {
        if self.is_answered || !line.can_send() {
            return Step::Wait;
        }
        let Some(message) = line.receive() else { return Step::Wait };
        let answer = match decode_streamed::<HealthCheckRequest>(message) {
            Ok(request) if request.service.is_empty() => serving(),
            Ok(_) => HealthCheckResponse { status: ServingStatus::ServiceUnknown as i32 },
            Err(refusal) => return Step::End(Err(refusal)),
        };
        line.send(answer.encode_to_vec().into());
        self.is_answered = true;
        Step::Wait
    }
}
