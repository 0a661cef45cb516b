"""The arena: a service where policies are tried on robots they have never met, blind, paired, seeded, with intervals.

`tables` is what is kept, `scheduler` what may happen to a trial, `gateway` the relay between a policy and a robot,
`worker` the process beside a robot, `views` what people see. Start with `offbook arena init`.
"""
